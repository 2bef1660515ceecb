/* Registers the product with torch through its stable C ABI, which is declared here: the package
 * builds without torch's headers and the library runs with any torch from 2.10 on.
 *
 *   dbllm::fdb_linear_tiled(Tensor x, Tensor tiles, int out_features, int group_size) -> Tensor
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "fdb.h"
#include "floats.h"

/* -- torch's stable C ABI: torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h -- */

typedef uint64_t stable_value;
typedef void *tensor;
typedef void (*range_function)(int64_t begin, int64_t end, void *context);

static struct {
    int32_t (*library_init_impl)(const char *, const char *, const char *, uint32_t, void **);
    int32_t (*library_impl)(void *, const char *, void (*)(stable_value *, uint64_t, uint64_t));
    int32_t (*delete_tensor)(tensor);
    int32_t (*data_ptr)(tensor, void **);
    int32_t (*dim)(tensor, int64_t *);
    int32_t (*sizes)(tensor, int64_t **);
    int32_t (*strides)(tensor, int64_t **);
    int32_t (*dtype)(tensor, int32_t *);
    int32_t (*empty)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, tensor *);
    int32_t (*parallel_for)(int64_t, int64_t, int64_t, range_function, void *);
    int32_t (*float32)(void);
    int32_t (*bfloat16)(void);
    int32_t (*float16)(void);
} torch;

static const struct {
    const char *name;
    void *address;
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
    {"torch_parallel_for", &torch.parallel_for},
    {"aoti_torch_dtype_float32", &torch.float32},
    {"aoti_torch_dtype_bfloat16", &torch.bfloat16},
    {"aoti_torch_dtype_float16", &torch.float16},
};

/* -- work memory: one buffer a thread, as large as the widest layer needs ----------------------- */

typedef struct {
    void *memory;
    size_t bytes;
} work_buffer;

static pthread_key_t work_key;

static void free_work(void *pointer) {
    work_buffer *work = pointer;
    free(work->memory);
    free(work);
}

static void *work_memory(size_t bytes) {
    work_buffer *work = pthread_getspecific(work_key);
    if (work == NULL) {
        work = calloc(1, sizeof *work);
        if (work == NULL) abort();
        pthread_setspecific(work_key, work);
    }
    if (work->bytes < bytes) {
        free(work->memory);
        work->memory = aligned_alloc(64, bytes);
        if (work->memory == NULL) abort();
        work->bytes = bytes;
    }
    return work->memory;
}

/* -- rows of x and y ---------------------------------------------------------------------------- */

typedef enum { FLOAT32, BFLOAT16, FLOAT16 } element_type;

typedef struct {
    char *data;
    element_type type;
    int64_t dim, sizes[64], strides[64];
} array;

static size_t element_bytes(element_type type) { return type == FLOAT32 ? 4 : 2; }

static void describe(tensor from, array *to) {
    int64_t *sizes, *strides;
    int32_t dtype;
    torch.data_ptr(from, (void **)&to->data);
    torch.dim(from, &to->dim);
    torch.sizes(from, &sizes);
    torch.strides(from, &strides);
    torch.dtype(from, &dtype);
    memcpy(to->sizes, sizes, (size_t)to->dim * sizeof *sizes);
    memcpy(to->strides, strides, (size_t)to->dim * sizeof *strides);
    to->type = dtype == torch.float32() ? FLOAT32 : dtype == torch.bfloat16() ? BFLOAT16 : FLOAT16;
}

/* Offset, in elements, of a row of the flattened leading dimensions. */
static int64_t row_offset(const array *x, int64_t row) {
    int64_t offset = 0;
    for (int64_t d = x->dim - 2; d >= 0; d--) {
        offset += row % x->sizes[d] * x->strides[d];
        row /= x->sizes[d];
    }
    return offset;
}

static void read_row(const array *x, int64_t row, int64_t count, float *to) {
    const char *from = x->data + row_offset(x, row) * (int64_t)element_bytes(x->type);
    int64_t stride = x->strides[x->dim - 1];
    if (x->type == FLOAT32)
        for (int64_t i = 0; i < count; i++) to[i] = ((const float *)from)[i * stride];
    else if (x->type == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            to[i] = fdb_from_bfloat16(((const uint16_t *)from)[i * stride]);
    else
        for (int64_t i = 0; i < count; i++)
            to[i] = fdb_from_float16(((const uint16_t *)from)[i * stride]);
}

/* -- one call ------------------------------------------------------------------------------------ */

typedef struct {
    fdb_shape shape;
    const fdb_kernel *kernel;
    const uint8_t *tiles;
    int64_t columns, words;
    uint8_t *tables;
    float *x, *steps, *y;
} call;

static void make_tables(int64_t first, int64_t last, void *context) {
    const call *c = context;
    c->kernel->tables(&c->shape, c->x, c->columns, first, last, c->tables, c->steps);
}

static void make_product(int64_t first, int64_t last, void *context) {
    const call *c = context;
    c->kernel->product(&c->shape, c->tiles, c->tables, c->steps, c->columns, first, last, c->y);
}

static size_t rounded(int64_t bytes) { return ((size_t)bytes + 63) / 64 * 64; }

static void divide_work_memory(call *c) {
    size_t tables = rounded(c->words * c->columns * c->kernel->table_bytes);
    size_t x = rounded(c->words * FDB_WORD_INPUTS * c->columns * 4);
    size_t steps = rounded(fdb_groups(&c->shape) * c->columns * 4);
    size_t y = rounded(fdb_blocks(&c->shape) * FDB_BLOCK_ROWS * c->columns * 4);
    char *memory = work_memory(tables + x + steps + y);
    c->tables = (uint8_t *)memory;
    c->x = (float *)(memory + tables);
    c->steps = (float *)(memory + tables + x);
    c->y = (float *)(memory + tables + x + steps);
}

enum {
    /* Bytes of tiles, groups of tables: less is not worth waking another thread. */
    GRAIN_BYTES = 1 << 16,
    GRAIN_GROUPS = 64,
};

static void write_block(const call *c, int64_t column, int64_t block, element_type type,
                        char *out) {
    const float *from = c->y + (block * c->columns + column) * FDB_BLOCK_ROWS;
    int64_t row = block * FDB_BLOCK_ROWS;
    int64_t count = fdb_min(FDB_BLOCK_ROWS, c->shape.out_features - row);
    char *to = out + (column * c->shape.out_features + row) * (int64_t)element_bytes(type);
    if (type == FLOAT32)
        memcpy(to, from, (size_t)count * 4);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[i] = fdb_to_bfloat16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[i] = fdb_to_float16(from[i]);
}

static void multiply(call *c, const array *x, int64_t first_row, char *out) {
    const fdb_shape *shape = &c->shape;
    int64_t padded = c->words * FDB_WORD_INPUTS, groups = fdb_groups(shape);
    divide_work_memory(c);
    for (int64_t column = 0; column < c->columns; column++) {
        float *to = c->x + column * padded;
        read_row(x, first_row + column, shape->in_features, to);
        memset(to + shape->in_features, 0, (size_t)(padded - shape->in_features) * sizeof *to);
    }
    torch.parallel_for(0, groups, 1 + GRAIN_GROUPS / c->columns, make_tables, c);
    int64_t block_bytes = FDB_BLOCK_TILES * fdb_tile_bytes(shape, 0, groups) * c->columns;
    torch.parallel_for(0, fdb_blocks(shape), 1 + GRAIN_BYTES / block_bytes, make_product, c);
    for (int64_t column = 0; column < c->columns; column++)
        for (int64_t block = 0; block < fdb_blocks(shape); block++)
            write_block(c, column, block, x->type, out);
}

static const fdb_instruction_set *chosen;

static tensor new_output(const array *x, int64_t out_features, int64_t *rows, char **data) {
    int64_t sizes[64], strides[64], stride = 1;
    memcpy(sizes, x->sizes, (size_t)x->dim * sizeof *sizes);
    sizes[x->dim - 1] = out_features;
    *rows = 1;
    for (int64_t d = x->dim - 1; d >= 0; d--) {
        strides[d] = stride;
        stride *= sizes[d];
        if (d < x->dim - 1) *rows *= sizes[d];
    }
    int32_t type = x->type == FLOAT32    ? torch.float32()
                   : x->type == BFLOAT16 ? torch.bfloat16()
                                         : torch.float16();
    tensor result;
    torch.empty(x->dim, sizes, strides, type, 0, 0, &result);
    torch.data_ptr(result, (void **)data);
    return result;
}

static void fdb_linear_tiled(stable_value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    tensor x = (tensor)stack[0], tiles = (tensor)stack[1];
    array input, weights;
    describe(x, &input);
    describe(tiles, &weights);
    call c = {.tiles = (const uint8_t *)weights.data};
    c.shape = (fdb_shape){input.sizes[input.dim - 1], (int64_t)stack[2], (int64_t)stack[3]};
    c.kernel = input.type == FLOAT32 ? chosen->exact : chosen->integer;
    c.words = fdb_words_before(&c.shape, fdb_groups(&c.shape));
    int64_t rows;
    char *data;
    tensor result = new_output(&input, c.shape.out_features, &rows, &data);
    size_t row_bytes = (size_t)c.shape.out_features * element_bytes(input.type);
    for (int64_t row = 0; row < rows; row += FDB_MAX_COLUMNS) {
        c.columns = fdb_min(FDB_MAX_COLUMNS, rows - row);
        multiply(&c, &input, row, data + (size_t)row * row_bytes);
    }
    torch.delete_tensor(x);
    torch.delete_tensor(tiles);
    stack[0] = (stable_value)result;
}

/* -- what Python calls --------------------------------------------------------------------------- */

static const fdb_instruction_set *const sets[] = {&fdb_avx512, &fdb_avx2, &fdb_neon, &fdb_portable};

/* Chooses an instruction set: the best one when `name` is NULL. Its name, or NULL. */
const char *dbllm_choose(const char *name) {
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (sets[i]->supported() && (name == NULL || strcmp(name, sets[i]->name) == 0)) {
            chosen = sets[i];
            return chosen->name;
        }
    return NULL;
}

/* Registers the operator's CPU implementation. NULL, or the name of what this torch lacks. */
const char *dbllm_register(const char *torch_library) {
    void *handle = dlopen(torch_library, RTLD_NOLOAD | RTLD_LAZY), *library;
    if (handle == NULL) return torch_library;
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *address = dlsym(handle, symbols[i].name);
        if (address == NULL) return symbols[i].name;
        memcpy(symbols[i].address, &address, sizeof address);
    }
    pthread_key_create(&work_key, free_work);
    if (torch.library_init_impl("dbllm", "CPU", __FILE__, __LINE__, &library) ||
        torch.library_impl(library, "fdb_linear_tiled", fdb_linear_tiled))
        return "aoti_torch_library_impl";
    return NULL;
}
