/* dbllm::fdb_linear_tiled(Tensor x, Tensor tiles, int out_features, int group_size) -> Tensor */
#include <string.h>

#include "fdb.h"
#include "torch_abi.h"

typedef struct {
    fdb_shape shape;
    const fdb_kernel* kernel;
    const array* input;
    const uint8_t* tiles;
    char* out;
    int64_t first_row, columns, words;
    uint8_t* tables;
    float *x, *steps, *y;
    float lowered[FDB_MAX_COLUMNS];
} call;

static void read_columns(int64_t first, int64_t last, void* context) {
    call* c = context;
    int64_t padded = c->words * FDB_WORD_INPUTS, inputs = c->shape.in_features;
    for (int64_t column = first; column < last; column++) {
        float* x = c->x + column * padded;
        c->lowered[column] = array_read_lifted(c->input, c->first_row + column, inputs, x);
        memset(x + inputs, 0, (size_t)(padded - inputs) * sizeof *x);
    }
}

static void make_tables(int64_t first, int64_t last, void* context) {
    const call* c = context;
    fdb_make_tables(c->kernel, &c->shape, c->x, c->columns, first, last, c->tables, c->steps);
}

static void make_product(int64_t first, int64_t last, void* context) {
    const call* c = context;
    int64_t outputs = c->shape.out_features;
    fdb_make_product(c->kernel, &c->shape, c->tiles, c->tables, c->steps, c->columns, first, last,
                     c->y);
    for (int64_t column = 0; column < c->columns; column++)
        for (int64_t block = first; block < last; block++) {
            float* y = c->y + (block * c->columns + column) * FDB_BLOCK_ROWS;
            int64_t at = block * FDB_BLOCK_ROWS;
            array_write(y, fdb_min(FDB_BLOCK_ROWS, outputs - at), c->lowered[column],
                        c->input->type, c->out, (c->first_row + column) * outputs + at);
        }
}

static void divide_work_memory(call* c) {
    size_t tables = work_bytes(c->words * c->columns * c->kernel->table_bytes);
    size_t x = work_bytes(c->words * FDB_WORD_INPUTS * c->columns * 4);
    size_t steps = work_bytes(fdb_groups(&c->shape) * c->columns * 4);
    size_t y = work_bytes(fdb_blocks(&c->shape) * FDB_BLOCK_ROWS * c->columns * 4);
    char* memory = work_memory(tables + x + steps + y);
    c->tables = (uint8_t*)memory;
    c->x = (float*)(memory + tables);
    c->steps = (float*)(memory + tables + x);
    c->y = (float*)(memory + tables + x + steps);
}

enum {
    /* Numbers read, groups of tables, bytes of tiles: less is not worth waking another thread. */
    GRAIN_INPUTS = 1 << 15,
    GRAIN_GROUPS = 64,
    GRAIN_BYTES = 1 << 16,
};

static void multiply(call* c) {
    const fdb_shape* shape = &c->shape;
    int64_t groups = fdb_groups(shape);
    divide_work_memory(c);
    torch.parallel_for(0, c->columns, 1 + GRAIN_INPUTS / shape->in_features, read_columns, c);
    torch.parallel_for(0, groups, 1 + GRAIN_GROUPS / c->columns, make_tables, c);
    int64_t block_bytes = FDB_BLOCK_TILES * fdb_tile_bytes(shape, 0, groups) * c->columns;
    torch.parallel_for(0, fdb_blocks(shape), 1 + GRAIN_BYTES / block_bytes, make_product, c);
}

const fdb_instruction_set* fdb_chosen;

static void fdb_linear_tiled(stable_value* stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    tensor x = (tensor)stack[0], tiles = (tensor)stack[1];
    array input, weights;
    array_describe(x, &input);
    array_describe(tiles, &weights);
    call c = {.input = &input, .tiles = (const uint8_t*)weights.data};
    c.shape = (fdb_shape){input.sizes[input.dim - 1], (int64_t)stack[2], (int64_t)stack[3]};
    c.kernel = input.type == FLOAT32 ? fdb_chosen->exact : fdb_chosen->integer;
    c.words = fdb_words_before(&c.shape, fdb_groups(&c.shape));
    int64_t rows;
    tensor result = array_like(&input, c.shape.out_features, &rows, &c.out);
    for (; c.first_row < rows; c.first_row += FDB_MAX_COLUMNS) {
        c.columns = fdb_min(FDB_MAX_COLUMNS, rows - c.first_row);
        multiply(&c);
    }
    torch.delete_tensor(x);
    torch.delete_tensor(tiles);
    stack[0] = (stable_value)result;
}

static const fdb_instruction_set* const sets[] = {&fdb_avx512, &fdb_avx2, &fdb_neon, &fdb_portable};

/* Whether this processor has an instruction set; changes nothing. */
EXPORT int dbllm_supports(const char* name) {
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (strcmp(name, sets[i]->name) == 0) return sets[i]->supported();
    return 0;
}

/* Chooses an instruction set: the best one when `name` is NULL. Its name, or NULL. */
EXPORT const char* dbllm_choose(const char* name) {
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        if (sets[i]->supported() && (name == NULL || strcmp(name, sets[i]->name) == 0)) {
            fdb_chosen = sets[i];
            return fdb_chosen->name;
        }
    return NULL;
}

/* Registers the operators' CPU implementations. NULL, or the name of what this torch lacks. */
EXPORT const char* dbllm_register(const char* torch_library) {
    void* library;
    const char* lacking = torch_abi_load(torch_library);
    if (lacking != NULL) return lacking;
    if (torch.library_init_impl("dbllm", "CPU", __FILE__, __LINE__, &library) ||
        torch.library_impl(library, "fdb_linear_tiled", fdb_linear_tiled) ||
        torch.library_impl(library, "int8_linear_cpu", int8_linear_cpu) ||
        torch.library_impl(library, "attend_one_cpu", attend_one_cpu) ||
        torch.library_impl(library, "rms_norm_cpu", rms_norm_cpu))
        return "aoti_torch_library_impl";
    return NULL;
}
