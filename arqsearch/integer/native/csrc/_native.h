/* What the two halves of the extension module share: memory, buffers and the handles of networks. Not in the C package. */
#ifndef ARQ_NATIVE_H
#define ARQ_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>
#include <string.h>

#include "arq.h"

/* Memory from malloc, aligned by hand. */
typedef struct block {
    void *raw;
    unsigned char *data;
} block;

/* At least one byte; data is null when there is no memory. */
block native_allocate(size_t bytes);

/* A copy of a buffer's content; 0 and an exception when there is no memory. */
int native_copy(block *memory, const Py_buffer *view);

/* Sets a ValueError with the status's text; always null. */
void *native_fail(arq_status status);

/* A C-contiguous buffer of items with one of the given format letters; 0 and an exception otherwise. */
int native_take(PyObject *object, Py_buffer *view, const char *formats, int writable, const char *name);

static inline size_t native_items(const Py_buffer *view)
{
    return (size_t)view->len / (size_t)view->itemsize;
}

/* The network of a handle; null and an exception for anything else. */
const arq_model *native_model(PyObject *capsule);

/* None, or the exception of what went wrong. */
PyObject *native_outcome(arq_status status, int no_memory);

/* _native_smoothing.c: functions of the module and their documentation. */
PyObject *native_noise_table(PyObject *module, PyObject *arguments);
PyObject *native_noise(PyObject *module, PyObject *arguments);
PyObject *native_count_votes(PyObject *module, PyObject *arguments);
PyObject *native_classes(PyObject *module, PyObject *arguments);
extern const char native_table_doc[], native_noise_doc[], native_votes_doc[], native_classes_doc[];

#endif
