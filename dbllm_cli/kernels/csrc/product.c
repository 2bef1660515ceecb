/* The order in which every kernel goes through groups, columns and tiles. */
#include <string.h>

#include "fdb.h"

enum { LANES = 16 };

/* In lanes, as vectors add them. */
static float sum_of(const float* x, int64_t words) {
    float lanes[LANES] = {0}, sum = 0;
    for (int64_t i = 0; i < words * FDB_WORD_INPUTS; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += x[i + lane];
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

void fdb_make_inputs(const fdb_kernel* kernel, const fdb_shape* shape, const float* x,
                     int64_t columns, int64_t first, int64_t last, const fdb_inputs* inputs) {
    int64_t all_words = fdb_words_before(shape, fdb_groups(shape));
    for (int64_t group = first; group < last; group++) {
        int64_t word = fdb_words_before(shape, group), words = fdb_group_words(shape, group);
        for (int64_t column = 0; column < columns; column++) {
            const float* own = x + (column * all_words + word) * FDB_WORD_INPUTS;
            if (inputs->sums != NULL) inputs->sums[group * columns + column] = sum_of(own, words);
            inputs->steps[group * columns + column] =
                kernel->table(own, words, columns * kernel->table_bytes,
                              inputs->tables + (word * columns + column) * kernel->table_bytes);
        }
    }
}

/* A block of a stretch, tile by tile. */
static void add_tiles(const fdb_kernel* kernel, const fdb_shape* shape, const uint8_t* tiles,
                      int64_t count, int64_t from, int64_t to, const uint8_t* tables,
                      const float* steps, int64_t columns, float* y) {
    int64_t stride = columns * kernel->table_bytes;
    for (int64_t group = from; group < to; group++) {
        int64_t words = fdb_group_words(shape, group);
        const uint8_t* own = tables + fdb_words_before(shape, group) * stride;
        for (int64_t i = 0; i < count; i++) {
            for (int64_t c = 0; c < columns; c++)
                kernel->tile(tiles, words, own + c * kernel->table_bytes, stride,
                             steps[group * columns + c],
                             y + c * FDB_BLOCK_ROWS + i * FDB_TILE_ROWS);
            tiles += fdb_tile_bytes(shape, group, group + 1);
        }
    }
}

void fdb_make_product(const fdb_kernel* kernel, const fdb_shape* shape, const uint8_t* tiles,
                      const uint8_t* offsets, const fdb_inputs* inputs, int64_t columns,
                      int64_t first, int64_t last, float* y) {
    const uint8_t* tables = inputs->tables;
    const float* steps = inputs->steps;
    int64_t groups = fdb_groups(shape), stretch = fdb_stretch_groups(shape);
    int64_t block_floats = columns * FDB_BLOCK_ROWS;
    memset(y + first * block_floats, 0, (size_t)((last - first) * block_floats) * sizeof *y);
    if (offsets != NULL)
        for (int64_t block = first; block < last; block++)
            kernel->offsets(offsets + block * groups * FDB_BLOCK_ROWS * 2, groups, inputs->sums,
                            columns, y + block * block_floats);
    for (int64_t from = 0; from < groups; from += stretch) {
        int64_t to = fdb_min(groups, from + stretch);
        for (int64_t block = first; block < last; block++) {
            const uint8_t* own = tiles + fdb_block_offset(shape, from, to, block);
            int64_t count = fdb_block_tiles(shape, block);
            float* out = y + block * block_floats;
            if (kernel->block != NULL)
                kernel->block(shape, own, count, from, to, tables, steps, columns, out);
            else
                add_tiles(kernel, shape, own, count, from, to, tables, steps, columns, out);
        }
    }
}
