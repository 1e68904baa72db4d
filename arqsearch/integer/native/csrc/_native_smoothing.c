/* The half of _native that draws noise and counts votes. */
#include "_native.h"

#include "arq_smoothing.h"

#define GUIDE_ENTRIES 65536

typedef struct loaded_noise {
    arq_noise noise;
    block high, low, guide;
} loaded_noise;

static const char NOISE[] = "arqsearch.native.noise";

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

static const arq_noise *noise_of(PyObject *capsule)
{
    const loaded_noise *loaded = PyCapsule_GetPointer(capsule, NOISE);
    return loaded ? &loaded->noise : NULL;
}

const char native_table_doc[] =
    "noise_table(high, low, lo, guided) -> handle of a noise table: halves of its inner thresholds (uint32), "
             "the smallest noise, and whether to build the guide.";
PyObject *native_noise_table(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *sources[2];
    int lo, guided;
    Py_buffer high, low;
    if (!PyArg_ParseTuple(arguments, "OOip:noise_table", &sources[0], &sources[1], &lo, &guided)) {
        return NULL;
    }
    if (!native_take(sources[0], &high, "I", 0, "high")) {
        return NULL;
    }
    if (!native_take(sources[1], &low, "I", 0, "low")) {
        PyBuffer_Release(&high);
        return NULL;
    }
    PyObject *handle = NULL;
    loaded_noise *loaded = calloc(1, sizeof *loaded);
    if (!loaded || !native_copy(&loaded->high, &high) || !native_copy(&loaded->low, &low)) {
        PyErr_NoMemory();
    } else if (native_items(&high) != native_items(&low) || native_items(&high) > UINT32_MAX) {
        native_fail(ARQ_ERROR_SIZE);
    } else {
        loaded->noise.high = (const uint32_t *)(const void *)loaded->high.data;
        loaded->noise.low = (const uint32_t *)(const void *)loaded->low.data;
        loaded->noise.count = (uint32_t)native_items(&high);
        loaded->noise.lo = lo;
        arq_status status = ARQ_OK;
        if (guided) {
            loaded->guide = native_allocate(GUIDE_ENTRIES * sizeof(int16_t));
            status = arq_noise_guide(&loaded->noise, (int16_t *)(void *)loaded->guide.data, GUIDE_ENTRIES);
        }
        handle = status == ARQ_OK ? PyCapsule_New(loaded, NOISE, noise_gone) : native_fail(status);
    }
    PyBuffer_Release(&high);
    PyBuffer_Release(&low);
    if (!handle) {
        free_noise(loaded);
    }
    return handle;
}

const char native_noise_doc[] =
    "noise(table, seed, stage, image id, first sample, out): int16 noise (samples, coordinates) of one image.";
PyObject *native_noise(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *handle, *target;
    unsigned long long seed;
    unsigned int stage, image_id, first;
    Py_buffer out;
    if (!PyArg_ParseTuple(arguments, "OKIIIO:noise", &handle, &seed, &stage, &image_id, &first, &target)) {
        return NULL;
    }
    const arq_noise *noise = noise_of(handle);
    if (!noise || !native_take(target, &out, "h", 1, "out")) {
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
    return native_outcome(status, 0);
}

typedef struct vote_task {
    uint64_t seed;
    uint32_t stage, first, samples;
    const uint32_t *image_ids;
    const uint8_t *images;
    uint32_t *votes;
    size_t count;
} vote_task;

/* Working memory of one call; `work` points into the blocks. */
typedef struct work_memory {
    block pixels, logits, arena;
    arq_workspace work;
} work_memory;

/* 0 when there is no memory; either way to be given back by close_work. */
static int open_work(work_memory *memory, const arq_model *model)
{
    const size_t size = (size_t)model->height * model->width * model->channels;
    memory->pixels = native_allocate(size * sizeof(int16_t));
    memory->logits = native_allocate(model->classes * sizeof(int32_t));
    memory->arena = native_allocate(model->arena_bytes);
    const arq_workspace work = {(int16_t *)(void *)memory->pixels.data, size, (int32_t *)(void *)memory->logits.data,
                                model->classes, memory->arena.data, model->arena_bytes};
    memory->work = work;
    return memory->pixels.data && memory->logits.data && memory->arena.data;
}

static void close_work(const work_memory *memory)
{
    free(memory->pixels.raw);
    free(memory->logits.raw);
    free(memory->arena.raw);
}

/* Votes of some images, added to (count, classes). */
static arq_status vote(const arq_model *model, const arq_noise *noise, const vote_task *task, const arq_workspace *work)
{
    arq_status status = ARQ_OK;
    for (size_t image = 0; image < task->count && status == ARQ_OK; image++) {
        status = arq_count_votes(model, noise, task->seed, task->stage, task->image_ids[image],
                                 task->images + image * work->pixel_count, task->first, task->samples,
                                 task->votes + image * model->classes, model->classes, work);
    }
    return status;
}

/* Class of each noisy copy of one image. */
static arq_status answer(const arq_model *model, const arq_noise *noise, const vote_task *task, uint16_t *classes,
                         const arq_workspace *work)
{
    arq_status status = ARQ_OK;
    for (uint32_t done = 0; done < task->samples && status == ARQ_OK; done++) {
        status = arq_noisy(noise, task->seed, task->stage, task->image_ids[0], task->first + done, task->images,
                           work->pixels, work->pixel_count);
        if (status == ARQ_OK) {
            status = arq_run(model, work->pixels, work->pixel_count, work->logits, work->logit_count, work->arena,
                             work->arena_bytes);
        }
        if (status == ARQ_OK) {
            classes[done] = (uint16_t)arq_first_maximum(work->logits, work->logit_count);
        }
    }
    return status;
}

const char native_votes_doc[] =
    "count_votes(handle, table, seed, stage, image ids, images, first sample, samples, votes): adds the votes "
             "on noisy copies of uint8 images (N, H, W, C) with uint32 ids (N) to uint32 votes (N, classes).";
PyObject *native_count_votes(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *handle, *table, *sources[3];
    unsigned long long seed;
    unsigned int stage, first, samples;
    if (!PyArg_ParseTuple(arguments, "OOKIOOIIO:count_votes", &handle, &table, &seed, &stage, &sources[0], &sources[1],
                          &first, &samples, &sources[2])) {
        return NULL;
    }
    const arq_model *model = native_model(handle);
    const arq_noise *noise = model ? noise_of(table) : NULL;
    if (!noise) {
        return NULL;
    }
    static const char *const formats[3] = {"I", "B", "I"};
    static const char *const names[3] = {"image ids", "images", "votes"};
    Py_buffer views[3];
    for (int i = 0; i < 3; i++) {
        if (!native_take(sources[i], &views[i], formats[i], i == 2, names[i])) {
            while (i-- > 0) {
                PyBuffer_Release(&views[i]);
            }
            return NULL;
        }
    }
    const size_t size = (size_t)model->height * model->width * model->channels;
    const vote_task task = {seed, stage, first, samples, views[0].buf, views[1].buf, views[2].buf, native_items(&views[0])};
    arq_status status = ARQ_ERROR_SIZE;
    int enough = 1;
    if (native_items(&views[1]) == task.count * size && native_items(&views[2]) == task.count * model->classes) {
        Py_BEGIN_ALLOW_THREADS
        work_memory memory;
        enough = open_work(&memory, model);
        if (enough) {
            status = vote(model, noise, &task, &memory.work);
        }
        close_work(&memory);
        Py_END_ALLOW_THREADS
    }
    for (int i = 0; i < 3; i++) {
        PyBuffer_Release(&views[i]);
    }
    return native_outcome(status, !enough);
}

const char native_classes_doc[] =
    "classes(handle, table, seed, stage, image id, image, first sample, out): the class of each "
                          "noisy copy of a uint8 image (H, W, C), as many copies as uint16 items in out.";
PyObject *native_classes(PyObject *Py_UNUSED(module), PyObject *arguments)
{
    PyObject *handle, *table, *source, *target;
    unsigned long long seed;
    unsigned int stage, image_id, first;
    Py_buffer image, out;
    if (!PyArg_ParseTuple(arguments, "OOKIIOIO:classes", &handle, &table, &seed, &stage, &image_id, &source, &first,
                          &target)) {
        return NULL;
    }
    const arq_model *model = native_model(handle);
    const arq_noise *noise = model ? noise_of(table) : NULL;
    if (!noise || !native_take(source, &image, "B", 0, "image")) {
        return NULL;
    }
    if (!native_take(target, &out, "H", 1, "out")) {
        PyBuffer_Release(&image);
        return NULL;
    }
    arq_status status = ARQ_ERROR_SIZE;
    int enough = 1;
    const size_t samples = native_items(&out);
    if (native_items(&image) == (size_t)model->height * model->width * model->channels && model->classes <= UINT16_MAX + 1u) {
        const uint32_t id = image_id;
        if (samples > 0 && samples - 1 > UINT32_MAX - first) {
            status = ARQ_ERROR_ARGUMENT; /* samples are numbered in 32 bits */
        } else if (noise->lo < model->pixel_lo || (int64_t)noise->lo + noise->count + UINT8_MAX > model->pixel_hi) {
            status = ARQ_ERROR_RANGE;
        } else {
            const vote_task task = {seed, stage, first, (uint32_t)samples, &id, image.buf, NULL, 1};
            Py_BEGIN_ALLOW_THREADS
            work_memory memory;
            enough = open_work(&memory, model);
            if (enough) {
                status = answer(model, noise, &task, out.buf, &memory.work);
            }
            close_work(&memory);
            Py_END_ALLOW_THREADS
        }
    }
    PyBuffer_Release(&image);
    PyBuffer_Release(&out);
    return native_outcome(status, !enough);
}

