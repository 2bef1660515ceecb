#include "torch_products.h"

#include <string.h>

static fdb_shape shape_of(const products* p, int64_t out_features) {
    return (fdb_shape){p->in_features, out_features, p->group_size};
}

/* Columns so small that their steps would be denormal are lifted, and their products lowered. */
static void lift(products* p) {
    int64_t row = products_row(p->in_features);
    for (int64_t column = 0; column < p->columns; column++)
        p->lowered[column] = array_lift(p->x + column * row, p->in_features);
}

static void make_inputs(int64_t first, int64_t last, void* context) {
    const products* p = context;
    fdb_shape shape = shape_of(p, 0);
    fdb_make_inputs(p->kernel, &shape, p->x, p->columns, first, last, &p->inputs);
}

static void write(const products* p, const packed_matrix* m, int64_t first, int64_t last) {
    for (int64_t column = 0; column < p->columns; column++)
        for (int64_t block = first; block < last; block++) {
            float* y = m->y + (block * p->columns + column) * FDB_BLOCK_ROWS;
            int64_t at = block * FDB_BLOCK_ROWS;
            array_write(y, fdb_min(FDB_BLOCK_ROWS, m->out_features - at), p->lowered[column],
                        p->type, m->out, column * m->out_features + at);
        }
}

/* Blocks `first` up to `last` of the matrices, one after the other. */
static void make_products(int64_t first, int64_t last, void* context) {
    const products* p = context;
    for (int64_t i = 0; i < p->count; i++) {
        const packed_matrix* m = &p->matrix[i];
        fdb_shape shape = shape_of(p, m->out_features);
        int64_t blocks = fdb_blocks(&shape), end = fdb_min(last, blocks);
        if (first < end) {
            fdb_make_product(p->kernel, &shape, m->tiles, m->offsets, &p->inputs, p->columns, first,
                             end, m->y);
            write(p, m, first, end);
        }
        first = first > blocks ? first - blocks : 0;
        last -= blocks;
        if (last <= 0) return;
    }
}

static int64_t blocks_of(const products* p, int64_t matrix) {
    fdb_shape shape = shape_of(p, p->matrix[matrix].out_features);
    return fdb_blocks(&shape);
}

static int64_t divide_work_memory(products* p) {
    int64_t words = products_row(p->in_features) / FDB_WORD_INPUTS, blocks = 0;
    fdb_shape shape = shape_of(p, 0);
    int offsets = 0;
    for (int64_t i = 0; i < p->count; i++) {
        blocks += blocks_of(p, i);
        offsets |= p->matrix[i].offsets != NULL;
    }
    size_t tables = work_bytes(words * p->columns * p->kernel->table_bytes);
    size_t steps = work_bytes(fdb_groups(&shape) * p->columns * 4);
    size_t y = work_bytes(blocks * FDB_BLOCK_ROWS * p->columns * 4);
    char* memory = work_memory(WORK_PRODUCTS, tables + 2 * steps + y);
    p->inputs = (fdb_inputs){(uint8_t*)memory, (float*)(memory + tables),
                             offsets ? (float*)(memory + tables + steps) : NULL};
    float* own = (float*)(memory + tables + 2 * steps);
    for (int64_t i = 0; i < p->count; i++) {
        p->matrix[i].y = own;
        own += blocks_of(p, i) * FDB_BLOCK_ROWS * p->columns;
    }
    return blocks;
}

enum {
    /* Groups of tables, bytes of tiles: less is not worth waking another thread. */
    GRAIN_GROUPS = 64,
    GRAIN_BYTES = 1 << 16,
};

void products_add(products* p, const array* tiles, int64_t out_features, char* out) {
    fdb_shape shape = shape_of(p, out_features);
    const uint8_t* data = (const uint8_t*)tiles->data;
    int64_t offsets = fdb_offsets_start(&shape);
    p->matrix[p->count++] = (packed_matrix){
        .tiles = data,
        .offsets = tiles->sizes[0] > offsets ? data + offsets : NULL,
        .out_features = out_features,
        .out = out,
    };
}

void products_multiply(products* p) {
    fdb_shape shape = shape_of(p, 0);
    int64_t groups = fdb_groups(&shape), blocks = divide_work_memory(p);
    lift(p);
    torch.parallel_for(0, groups, 1 + GRAIN_GROUPS / p->columns, make_inputs, p);
    int64_t block_bytes = FDB_BLOCK_TILES * fdb_tile_bytes(&shape, 0, groups) * p->columns;
    torch.parallel_for(0, blocks, 1 + GRAIN_BYTES / block_bytes, make_products, p);
}
