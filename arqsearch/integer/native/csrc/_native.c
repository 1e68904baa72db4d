/* arqsearch.integer.native._native: the C engine for Python, on the limited API. Used by engine.py alone.
 *
 * Buffers are checked here for type and size, their values by the engine; every call that takes time releases the
 * interpreter lock and keeps its working memory to itself, so that threads may share a model and a noise table.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>
#include <string.h>

#include "arq.h"
#include "arq_smoothing.h"

#define ALIGNMENT 64
#define GUIDE_ENTRIES 65536

/* Memory from malloc, aligned by hand. */
typedef struct block {
    void *raw;
    unsigned char *data;
} block;

typedef struct loaded_model {
    arq_model model;
    block words;
    block prepared;
} loaded_model;

typedef struct loaded_noise {
    arq_noise noise;
    block high, low, guide;
} loaded_noise;

static const char MODEL[] = "arqsearch.native.model";
static const char NOISE[] = "arqsearch.native.noise";

/* At least one byte; data is null when there is no memory. */
static block allocate(size_t bytes)
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

static void *fail(arq_status status)
{
    PyErr_SetString(PyExc_ValueError, arq_status_text(status));
    return NULL;
}

/* A C-contiguous buffer of items with one of the given format letters; 0 and an exception otherwise. */
static int take(PyObject *object, Py_buffer *view, const char *formats, int writable, const char *name)
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

static size_t items(const Py_buffer *view)
{
    return (size_t)view->len / (size_t)view->itemsize;
}

static int copy_words(block *memory, const Py_buffer *view)
{
    *memory = allocate((size_t)view->len);
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

static void free_noise(loaded_noise *loaded)
{
    if (loaded) {
        free(loaded->high.raw);
        free(loaded->low.raw);
        free(loaded->guide.raw);
        free(loaded);
    }
}

static void noise_gone(PyObject *capsule)
{
    free_noise(PyCapsule_GetPointer(capsule, NOISE));
}

static const arq_model *model_of(PyObject *capsule)
{
    const loaded_model *loaded = PyCapsule_GetPointer(capsule, MODEL);
    return loaded ? &loaded->model : NULL;
}

static const arq_noise *noise_of(PyObject *capsule)
{
    const loaded_noise *loaded = PyCapsule_GetPointer(capsule, NOISE);
    return loaded ? &loaded->noise : NULL;
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
        return fail(ARQ_ERROR_ARGUMENT);
    }
    if (!arq_isa_supported((arq_isa)isa)) {
        return fail(ARQ_ERROR_UNSUPPORTED);
    }
    if (!take(source, &words, "I", 0, "words")) {
        return NULL;
    }
    loaded_model *loaded = calloc(1, sizeof *loaded);
    if (!loaded || !copy_words(&loaded->words, &words)) {
        PyBuffer_Release(&words);
        free_model(loaded);
        return PyErr_NoMemory();
    }
    const size_t count = items(&words);
    PyBuffer_Release(&words);
    arq_status status;
    int no_memory = 0;
    Py_BEGIN_ALLOW_THREADS
    status = arq_open(&loaded->model, (const uint32_t *)(const void *)loaded->words.data, count);
    if (status == ARQ_OK) {
        const size_t bytes = arq_prepared_bytes(&loaded->model, (arq_isa)isa);
        loaded->prepared = allocate(bytes);
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
        fail(status);
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
    const arq_model *model = model_of(handle);
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
    const arq_model *model = model_of(handle);
    if (!model || !take(source, &pixels, "Bh", 0, "pixels")) {
        return NULL;
    }
    if (!take(target, &logits, "i", 1, "logits")) {
        PyBuffer_Release(&pixels);
        return NULL;
    }
    const size_t size = (size_t)model->height * model->width * model->channels;
    const size_t images = items(&logits) / model->classes;
    arq_status status = ARQ_ERROR_SIZE;
    int no_memory = 0;
    if (items(&logits) == images * model->classes && items(&pixels) == images * size) {
        Py_BEGIN_ALLOW_THREADS
        const block arena = allocate(model->arena_bytes);
        const block wide = pixels.itemsize == 1 ? allocate(size * sizeof(int16_t)) : (block){NULL, NULL};
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
    if (no_memory) {
        return PyErr_NoMemory();
    }
    if (status != ARQ_OK) {
        return fail(status);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(table_doc,
             "noise_table(high, low, lo, guided) -> handle of a noise table: halves of its inner thresholds (uint32), "
             "the smallest noise, and whether to build the guide.");
static PyObject *noise_table(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *sources[2];
    int lo, guided;
    Py_buffer high, low;
    if (!PyArg_ParseTuple(arguments, "OOip:noise_table", &sources[0], &sources[1], &lo, &guided)) {
        return NULL;
    }
    if (!take(sources[0], &high, "I", 0, "high")) {
        return NULL;
    }
    if (!take(sources[1], &low, "I", 0, "low")) {
        PyBuffer_Release(&high);
        return NULL;
    }
    PyObject *handle = NULL;
    loaded_noise *loaded = calloc(1, sizeof *loaded);
    if (!loaded || !copy_words(&loaded->high, &high) || !copy_words(&loaded->low, &low)) {
        PyErr_NoMemory();
    } else if (items(&high) != items(&low) || items(&high) > UINT32_MAX) {
        fail(ARQ_ERROR_SIZE);
    } else {
        loaded->noise.high = (const uint32_t *)(const void *)loaded->high.data;
        loaded->noise.low = (const uint32_t *)(const void *)loaded->low.data;
        loaded->noise.count = (uint32_t)items(&high);
        loaded->noise.lo = lo;
        arq_status status = ARQ_OK;
        if (guided) {
            loaded->guide = allocate(GUIDE_ENTRIES * sizeof(int16_t));
            status = arq_noise_guide(&loaded->noise, (int16_t *)(void *)loaded->guide.data, GUIDE_ENTRIES);
        }
        handle = status == ARQ_OK ? PyCapsule_New(loaded, NOISE, noise_gone) : fail(status);
    }
    PyBuffer_Release(&high);
    PyBuffer_Release(&low);
    if (!handle) {
        free_noise(loaded);
    }
    return handle;
}

PyDoc_STRVAR(noise_doc,
             "noise(table, seed, stage, image id, first sample, out): int16 noise (samples, coordinates) of one image.");
static PyObject *draw_noise(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *handle, *target;
    unsigned long long seed;
    unsigned int stage, image_id, first;
    Py_buffer out;
    if (!PyArg_ParseTuple(arguments, "OKIIIO:noise", &handle, &seed, &stage, &image_id, &first, &target)) {
        return NULL;
    }
    const arq_noise *noise = noise_of(handle);
    if (!noise || !take(target, &out, "h", 1, "out")) {
        return NULL;
    }
    arq_status status = ARQ_ERROR_SIZE;
    if (out.ndim == 2) {
        const size_t samples = (size_t)out.shape[0], coordinates = (size_t)out.shape[1];
        Py_BEGIN_ALLOW_THREADS
        status = samples > 0 && samples - 1 > UINT32_MAX - first ? ARQ_ERROR_ARGUMENT : ARQ_OK;
        for (size_t sample = 0; sample < samples && status == ARQ_OK; sample++) {
            status = arq_noisy(noise, seed, stage, image_id, first + (uint32_t)sample, NULL,
                               (int16_t *)out.buf + sample * coordinates, coordinates);
        }
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&out);
    if (status != ARQ_OK) {
        return fail(status);
    }
    Py_RETURN_NONE;
}

typedef struct vote_task {
    uint64_t seed;
    uint32_t stage, first, samples;
    const uint32_t *image_ids;
    const uint8_t *images;
    uint32_t *votes;
    size_t count;
} vote_task;

/* Votes of some images, added to (count, classes); 0 when there is no memory. */
static int vote(const arq_model *model, const arq_noise *noise, const vote_task *task, arq_status *status)
{
    const size_t size = (size_t)model->height * model->width * model->channels;
    const block pixels = allocate(size * sizeof(int16_t));
    const block logits = allocate(model->classes * sizeof(int32_t));
    const block arena = allocate(model->arena_bytes);
    const int enough = pixels.data && logits.data && arena.data;
    if (enough) {
        const arq_workspace work = {(int16_t *)(void *)pixels.data, size, (int32_t *)(void *)logits.data,
                                    model->classes, arena.data, model->arena_bytes};
        *status = ARQ_OK;
        for (size_t image = 0; image < task->count && *status == ARQ_OK; image++) {
            *status = arq_count_votes(model, noise, task->seed, task->stage, task->image_ids[image],
                                      task->images + image * size, task->first, task->samples,
                                      task->votes + image * model->classes, model->classes, &work);
        }
    }
    free(pixels.raw);
    free(logits.raw);
    free(arena.raw);
    return enough;
}

PyDoc_STRVAR(votes_doc,
             "count_votes(handle, table, seed, stage, image ids, images, first sample, samples, votes): adds the votes "
             "on noisy copies of uint8 images (N, H, W, C) with uint32 ids (N) to uint32 votes (N, classes).");
static PyObject *count_votes(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *handle, *table, *sources[3];
    unsigned long long seed;
    unsigned int stage, first, samples;
    if (!PyArg_ParseTuple(arguments, "OOKIOOIIO:count_votes", &handle, &table, &seed, &stage, &sources[0], &sources[1],
                          &first, &samples, &sources[2])) {
        return NULL;
    }
    const arq_model *model = model_of(handle);
    const arq_noise *noise = model ? noise_of(table) : NULL;
    if (!noise) {
        return NULL;
    }
    static const char *const formats[3] = {"I", "B", "I"};
    static const char *const names[3] = {"image ids", "images", "votes"};
    Py_buffer views[3];
    for (int i = 0; i < 3; i++) {
        if (!take(sources[i], &views[i], formats[i], i == 2, names[i])) {
            while (i-- > 0) {
                PyBuffer_Release(&views[i]);
            }
            return NULL;
        }
    }
    const size_t size = (size_t)model->height * model->width * model->channels;
    const vote_task task = {seed, stage, first, samples, views[0].buf, views[1].buf, views[2].buf, items(&views[0])};
    arq_status status = ARQ_ERROR_SIZE;
    int enough = 1;
    if (items(&views[1]) == task.count * size && items(&views[2]) == task.count * model->classes) {
        Py_BEGIN_ALLOW_THREADS
        enough = vote(model, noise, &task, &status);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < 3; i++) {
        PyBuffer_Release(&views[i]);
    }
    if (!enough) {
        return PyErr_NoMemory();
    }
    if (status != ARQ_OK) {
        return fail(status);
    }
    Py_RETURN_NONE;
}

/* Class of each noisy copy of one image; 0 when there is no memory. */
static int answer(const arq_model *model, const arq_noise *noise, const vote_task *task, uint16_t *classes,
                  arq_status *status)
{
    const size_t size = (size_t)model->height * model->width * model->channels;
    const block pixels = allocate(size * sizeof(int16_t));
    const block logits = allocate(model->classes * sizeof(int32_t));
    const block arena = allocate(model->arena_bytes);
    const int enough = pixels.data && logits.data && arena.data;
    if (enough) {
        int16_t *noisy = (int16_t *)(void *)pixels.data;
        int32_t *found = (int32_t *)(void *)logits.data;
        *status = ARQ_OK;
        for (uint32_t done = 0; done < task->samples && *status == ARQ_OK; done++) {
            *status = arq_noisy(noise, task->seed, task->stage, task->image_ids[0], task->first + done, task->images,
                                noisy, size);
            if (*status == ARQ_OK) {
                *status = arq_run(model, noisy, size, found, model->classes, arena.data, model->arena_bytes);
            }
            if (*status == ARQ_OK) {
                classes[done] = (uint16_t)arq_first_maximum(found, model->classes);
            }
        }
    }
    free(pixels.raw);
    free(logits.raw);
    free(arena.raw);
    return enough;
}

PyDoc_STRVAR(classes_doc, "classes(handle, table, seed, stage, image id, image, first sample, out): the class of each "
                          "noisy copy of a uint8 image (H, W, C), as many copies as uint16 items in out.");
static PyObject *classes(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *handle, *table, *source, *target;
    unsigned long long seed;
    unsigned int stage, image_id, first;
    Py_buffer image, out;
    if (!PyArg_ParseTuple(arguments, "OOKIIOIO:classes", &handle, &table, &seed, &stage, &image_id, &source, &first,
                          &target)) {
        return NULL;
    }
    const arq_model *model = model_of(handle);
    const arq_noise *noise = model ? noise_of(table) : NULL;
    if (!noise || !take(source, &image, "B", 0, "image")) {
        return NULL;
    }
    if (!take(target, &out, "H", 1, "out")) {
        PyBuffer_Release(&image);
        return NULL;
    }
    arq_status status = ARQ_ERROR_SIZE;
    int enough = 1;
    const size_t samples = items(&out);
    if (items(&image) == (size_t)model->height * model->width * model->channels && model->classes <= UINT16_MAX + 1u) {
        const uint32_t id = image_id;
        if (samples > 0 && samples - 1 > UINT32_MAX - first) {
            status = ARQ_ERROR_ARGUMENT; /* samples are numbered in 32 bits */
        } else if (noise->lo < model->pixel_lo || (int64_t)noise->lo + noise->count + UINT8_MAX > model->pixel_hi) {
            status = ARQ_ERROR_RANGE;
        } else {
            const vote_task task = {seed, stage, first, (uint32_t)samples, &id, image.buf, NULL, 1};
            Py_BEGIN_ALLOW_THREADS
            enough = answer(model, noise, &task, out.buf, &status);
            Py_END_ALLOW_THREADS
        }
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&out);
    if (!enough) {
        return PyErr_NoMemory();
    }
    if (status != ARQ_OK) {
        return fail(status);
    }
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"isas", isas, METH_NOARGS, isas_doc},
    {"open", open_model, METH_VARARGS, open_doc},
    {"describe", describe, METH_O, describe_doc},
    {"run", run, METH_VARARGS, run_doc},
    {"noise_table", noise_table, METH_VARARGS, table_doc},
    {"noise", draw_noise, METH_VARARGS, noise_doc},
    {"count_votes", count_votes, METH_VARARGS, votes_doc},
    {"classes", classes, METH_VARARGS, classes_doc},
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
