/* arqsearch.integer.native._native: the C engine for Python, on the limited API. Used by engine.py alone.
 *
 * Buffers are checked here for type and size, their values by the engine; every call that takes time releases the
 * interpreter lock and keeps its working memory to itself, so that threads may share a model and a noise table.
 */
#include "_native.h"

#define ALIGNMENT 64

typedef struct loaded_model {
    arq_model model;
    block words;
    block prepared;
} loaded_model;

static const char MODEL[] = "arqsearch.native.model";

block native_allocate(size_t bytes)
{
    block memory = {NULL, NULL};
    if (bytes > SIZE_MAX - ALIGNMENT) {
        return memory;
    }
    memory.raw = malloc(bytes + ALIGNMENT);
    if (memory.raw) {
        unsigned char *start = memory.raw;
        memory.data = start + (ALIGNMENT - (uintptr_t)start % ALIGNMENT);
    }
    return memory;
}

void *native_fail(arq_status status)
{
    PyErr_SetString(PyExc_ValueError, arq_status_text(status));
    return NULL;
}

PyObject *native_outcome(arq_status status, int no_memory)
{
    if (no_memory) {
        return PyErr_NoMemory();
    }
    if (status != ARQ_OK) {
        return native_fail(status);
    }
    Py_RETURN_NONE;
}

int native_take(PyObject *object, Py_buffer *view, const char *formats, int writable, const char *name)
{
    if (PyObject_GetBuffer(object, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0)) != 0) {
        return 0;
    }
    if (view->format == NULL || strlen(view->format) != 1 || strchr(formats, view->format[0]) == NULL) {
        PyErr_Format(PyExc_TypeError, "%s: items of format '%s', expected one of '%s'", name,
                     view->format ? view->format : "B", formats);
        PyBuffer_Release(view);
        return 0;
    }
    return 1;
}

int native_copy(block *memory, const Py_buffer *view)
{
    *memory = native_allocate((size_t)view->len);
    if (!memory->data) {
        PyErr_NoMemory();
        return 0;
    }
    memcpy(memory->data, view->buf, (size_t)view->len);
    return 1;
}

static void free_model(loaded_model *loaded)
{
    if (loaded) {
        free(loaded->words.raw);
        free(loaded->prepared.raw);
        free(loaded);
    }
}

static void model_gone(PyObject *capsule)
{
    free_model(PyCapsule_GetPointer(capsule, MODEL));
}

const arq_model *native_model(PyObject *capsule)
{
    const loaded_model *loaded = PyCapsule_GetPointer(capsule, MODEL);
    return loaded ? &loaded->model : NULL;
}

PyDoc_STRVAR(isas_doc, "isas() -> tuple of the instruction sets that this build and processor run, slowest first.");
static PyObject *isas(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(unused))
{
    PyObject *names = PyList_New(0);
    for (int isa = ARQ_ISA_PORTABLE; names && isa <= ARQ_ISA_NEON; isa++) {
        if (arq_isa_supported((arq_isa)isa)) {
            PyObject *name = PyUnicode_FromString(arq_isa_name((arq_isa)isa));
            if (!name || PyList_Append(names, name) != 0) {
                Py_CLEAR(names);
            }
            Py_XDECREF(name);
        }
    }
    PyObject *result = names ? PyList_AsTuple(names) : NULL;
    Py_XDECREF(names);
    return result;
}

PyDoc_STRVAR(open_doc,
             "open(words, isa) -> handle of a network, weights prepared for an instruction set ('auto': the fastest).");
static PyObject *open_model(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *source;
    const char *name;
    Py_buffer words;
    if (!PyArg_ParseTuple(arguments, "Os:open", &source, &name)) {
        return NULL;
    }
    int isa = ARQ_ISA_AUTO;
    while (isa <= ARQ_ISA_NEON && strcmp(name, arq_isa_name((arq_isa)isa)) != 0) {
        isa++;
    }
    if (isa > ARQ_ISA_NEON) {
        return native_fail(ARQ_ERROR_ARGUMENT);
    }
    if (!arq_isa_supported((arq_isa)isa)) {
        return native_fail(ARQ_ERROR_UNSUPPORTED);
    }
    if (!native_take(source, &words, "I", 0, "words")) {
        return NULL;
    }
    loaded_model *loaded = calloc(1, sizeof *loaded);
    if (!loaded || !native_copy(&loaded->words, &words)) {
        PyBuffer_Release(&words);
        free_model(loaded);
        return PyErr_NoMemory();
    }
    const size_t count = native_items(&words);
    PyBuffer_Release(&words);
    arq_status status;
    int no_memory = 0;
    Py_BEGIN_ALLOW_THREADS
    status = arq_open(&loaded->model, (const uint32_t *)(const void *)loaded->words.data, count);
    if (status == ARQ_OK) {
        const size_t bytes = arq_prepared_bytes(&loaded->model, (arq_isa)isa);
        loaded->prepared = native_allocate(bytes);
        no_memory = !loaded->prepared.data;
        if (!no_memory) {
            status = arq_prepare(&loaded->model, (arq_isa)isa, loaded->prepared.data, bytes);
        }
    }
    Py_END_ALLOW_THREADS
    PyObject *handle = NULL;
    if (no_memory) {
        PyErr_NoMemory();
    } else if (status != ARQ_OK) {
        native_fail(status);
    } else {
        handle = PyCapsule_New(loaded, MODEL, model_gone);
    }
    if (!handle) {
        free_model(loaded);
    }
    return handle;
}

PyDoc_STRVAR(describe_doc, "describe(handle) -> (height, width, channels, classes, arena bytes, instruction set).");
static PyObject *describe(PyObject *Py_UNUSED(module), PyObject *handle)
{
    const arq_model *model = native_model(handle);
    if (!model) {
        return NULL;
    }
    return Py_BuildValue("(IIIIIs)", model->height, model->width, model->channels, model->classes, model->arena_bytes,
                         arq_isa_name(model->isa));
}

/* Images one after the other. Bytes are widened image by image in `wide`, which may be null for 16-bit pixels. */
static arq_status run_images(const arq_model *model, const Py_buffer *pixels, int32_t *logits, size_t images,
                             int16_t *wide, void *arena)
{
    const size_t size = (size_t)model->height * model->width * model->channels;
    for (size_t image = 0; image < images; image++) {
        const int16_t *input = (const int16_t *)pixels->buf + image * size;
        if (wide) {
            const uint8_t *bytes = (const uint8_t *)pixels->buf + image * size;
            for (size_t i = 0; i < size; i++) {
                wide[i] = bytes[i];
            }
            input = wide;
        }
        const arq_status status = arq_run(model, input, size, logits + image * model->classes, model->classes, arena,
                                          model->arena_bytes);
        if (status != ARQ_OK) {
            return status;
        }
    }
    return ARQ_OK;
}

PyDoc_STRVAR(run_doc, "run(handle, pixels, logits): int32 logits (N, classes) of uint8 or int16 pixels (N, H, W, C).");
static PyObject *run(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *handle, *source, *target;
    Py_buffer pixels, logits;
    if (!PyArg_ParseTuple(arguments, "OOO:run", &handle, &source, &target)) {
        return NULL;
    }
    const arq_model *model = native_model(handle);
    if (!model || !native_take(source, &pixels, "Bh", 0, "pixels")) {
        return NULL;
    }
    if (!native_take(target, &logits, "i", 1, "logits")) {
        PyBuffer_Release(&pixels);
        return NULL;
    }
    const size_t size = (size_t)model->height * model->width * model->channels;
    const size_t images = native_items(&logits) / model->classes;
    arq_status status = ARQ_ERROR_SIZE;
    int no_memory = 0;
    if (native_items(&logits) == images * model->classes && native_items(&pixels) == images * size) {
        Py_BEGIN_ALLOW_THREADS
        const block arena = native_allocate(model->arena_bytes);
        const block wide = pixels.itemsize == 1 ? native_allocate(size * sizeof(int16_t)) : (block){NULL, NULL};
        no_memory = !arena.data || (pixels.itemsize == 1 && !wide.data);
        if (!no_memory) {
            status = run_images(model, &pixels, logits.buf, images, (int16_t *)(void *)wide.data, arena.data);
        }
        free(arena.raw);
        free(wide.raw);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&pixels);
    PyBuffer_Release(&logits);
    return native_outcome(status, no_memory);
}

static PyMethodDef functions[] = {
    {"isas", isas, METH_NOARGS, isas_doc},
    {"open", open_model, METH_VARARGS, open_doc},
    {"describe", describe, METH_O, describe_doc},
    {"run", run, METH_VARARGS, run_doc},
    {"noise_table", native_noise_table, METH_VARARGS, native_table_doc},
    {"noise", native_noise, METH_VARARGS, native_noise_doc},
    {"count_votes", native_count_votes, METH_VARARGS, native_votes_doc},
    {"classes", native_classes, METH_VARARGS, native_classes_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "The C engine of arqsearch.",
    .m_size = 0,
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&definition);
}
