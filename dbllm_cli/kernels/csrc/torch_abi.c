#define _GNU_SOURCE
#include "torch_abi.h"

#include <dlfcn.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "floats.h"

torch_abi torch;

static const struct {
    const char* name;
    void* address;
} symbols[] = {
    {"aoti_torch_library_init_impl", &torch.library_init_impl},
    {"aoti_torch_library_impl", &torch.library_impl},
    {"aoti_torch_delete_tensor_object", &torch.delete_tensor},
    {"aoti_torch_get_data_ptr", &torch.data_ptr},
    {"aoti_torch_get_dim", &torch.dim},
    {"aoti_torch_get_sizes", &torch.sizes},
    {"aoti_torch_get_strides", &torch.strides},
    {"aoti_torch_get_dtype", &torch.dtype},
    {"aoti_torch_empty_strided", &torch.empty},
    {"torch_get_num_threads", &torch.threads},
    {"torch_parallel_for", &torch.parallel_for},
    {"aoti_torch_dtype_float32", &torch.float32},
    {"aoti_torch_dtype_bfloat16", &torch.bfloat16},
    {"aoti_torch_dtype_float16", &torch.float16},
    {"aoti_torch_dtype_uint8", &torch.uint8},
    {"aoti_torch_dtype_bool", &torch.boolean},
};

/* -- work memory: buffers of a thread, as large as the widest layer needs -- */

typedef struct {
    void* memory;
    size_t bytes;
} work_buffer;

static pthread_key_t work_key;

static void free_work(void* pointer) {
    work_buffer* buffers = pointer;
    for (int use = 0; use < WORK_USES; use++) free(buffers[use].memory);
    free(buffers);
}

void* work_memory(work_use use, size_t bytes) {
    work_buffer* buffers = pthread_getspecific(work_key);
    if (buffers == NULL) {
        buffers = calloc(WORK_USES, sizeof *buffers);
        if (buffers == NULL) abort();
        pthread_setspecific(work_key, buffers);
    }
    work_buffer* own = &buffers[use];
    if (own->bytes < bytes) {
        free(own->memory);
        own->memory = aligned_alloc(64, bytes);
        if (own->memory == NULL) abort();
        own->bytes = bytes;
    }
    return own->memory;
}

const char* torch_abi_load(const char* torch_library) {
    void* handle = dlopen(torch_library, RTLD_NOLOAD | RTLD_LAZY);
    if (handle == NULL) return torch_library;
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void* address = dlsym(handle, symbols[i].name);
        if (address == NULL) return symbols[i].name;
        memcpy(symbols[i].address, &address, sizeof address);
    }
    /* Of libstdc++, and of libc++: the C ABI has no way to raise an error in an operator. */
    void* thrower = dlsym(handle, "_ZSt21__throw_runtime_errorPKc");
    if (thrower == NULL) thrower = dlsym(handle, "_ZNSt3__121__throw_runtime_errorEPKc");
    if (thrower == NULL) return "std::__throw_runtime_error";
    memcpy(&torch.throw_error, &thrower, sizeof thrower);
    pthread_key_create(&work_key, free_work);
    return NULL;
}

/* -- arrays -- */

void array_describe(tensor from, array* to) {
    int64_t *sizes, *strides;
    int32_t dtype;
    torch.data_ptr(from, (void**)&to->data);
    torch.dim(from, &to->dim);
    torch.sizes(from, &sizes);
    torch.strides(from, &strides);
    torch.dtype(from, &dtype);
    to->type = OTHER; /* which no operator takes */
    if (to->dim > ARRAY_MAX_DIM) {
        to->dim = 1, to->sizes[0] = 0, to->strides[0] = 1;
        return;
    }
    memcpy(to->sizes, sizes, (size_t)to->dim * sizeof *sizes);
    memcpy(to->strides, strides, (size_t)to->dim * sizeof *strides);
    to->type = dtype == torch.float32()    ? FLOAT32
               : dtype == torch.bfloat16() ? BFLOAT16
               : dtype == torch.float16()  ? FLOAT16
               : dtype == torch.uint8()    ? UINT8
               : dtype == torch.boolean()  ? BOOLEAN
                                           : OTHER;
}

/* Offset, in elements, of a row of the flattened leading dimensions. */
static int64_t row_offset(const array* x, int64_t row) {
    int64_t offset = 0;
    for (int64_t d = x->dim - 2; d >= 0; d--) {
        offset += row % x->sizes[d] * x->strides[d];
        row /= x->sizes[d];
    }
    return offset;
}

/* Elements `stride` apart; a loop of its own for 1, which compilers make vectors of. */
#define READ(convert, from)                                                          \
    do {                                                                             \
        if (stride == 1)                                                             \
            for (int64_t i = 0; i < count; i++) to[i] = convert((from)[i]);          \
        else                                                                         \
            for (int64_t i = 0; i < count; i++) to[i] = convert((from)[i * stride]); \
    } while (0)

void array_read(const array* x, int64_t row, int64_t count, float* to) {
    const void* from = x->data + row_offset(x, row) * array_element_bytes(x);
    int64_t stride = x->strides[x->dim - 1];
    if (x->type == FLOAT32)
        READ(, (const float*)from);
    else if (x->type == BFLOAT16)
        READ(fdb_from_bfloat16, (const uint16_t*)from);
    else
        READ(fdb_from_float16, (const uint16_t*)from);
}

float array_lift(float* x, int64_t count) {
    int zeros = 1;
    for (int64_t i = 0; i < count; i++) {
        if (fabsf(x[i]) >= 0x1p-64f) return 1;
        zeros &= x[i] == 0;
    }
    if (zeros) return 1;
    for (int64_t i = 0; i < count; i++) x[i] *= 0x1p64f;
    return 0x1p-64f;
}

void array_write(float* from, int64_t count, float factor, element_type type, char* data,
                 int64_t at) {
    if (factor != 1)
        for (int64_t i = 0; i < count; i++) from[i] *= factor;
    if (type == FLOAT32)
        memcpy((float*)data + at, from, (size_t)count * 4);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) ((uint16_t*)data)[at + i] = fdb_to_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t*)data)[at + i] = fdb_to_float16(from[i]);
}

tensor array_new(const int64_t* sizes, int64_t dim, element_type type, char** data) {
    int64_t strides[ARRAY_MAX_DIM], stride = 1;
    for (int64_t d = dim - 1; d >= 0; d--) {
        strides[d] = stride;
        stride *= sizes[d];
    }
    int32_t dtype = type == FLOAT32    ? torch.float32()
                    : type == BFLOAT16 ? torch.bfloat16()
                                       : torch.float16();
    tensor result;
    if (torch.empty(dim, sizes, strides, dtype, 0, 0, &result)) abort(); /* no memory */
    torch.data_ptr(result, (void**)data);
    return result;
}

tensor array_like(const array* x, int64_t last, int64_t* rows, char** data) {
    int64_t sizes[ARRAY_MAX_DIM];
    memcpy(sizes, x->sizes, (size_t)x->dim * sizeof *sizes);
    sizes[x->dim - 1] = last;
    *rows = 1;
    for (int64_t d = 0; d < x->dim - 1; d++) *rows *= sizes[d];
    return array_new(sizes, x->dim, x->type, data);
}
