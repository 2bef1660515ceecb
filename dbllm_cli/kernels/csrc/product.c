/* The order in which every kernel goes through groups, columns and tiles. */
#include <string.h>

#include "fdb.h"

void fdb_make_tables(const fdb_kernel* kernel, const fdb_shape* shape, const float* x,
                     int64_t columns, int64_t first, int64_t last, uint8_t* tables, float* steps) {
    int64_t all_words = fdb_words_before(shape, fdb_groups(shape));
    for (int64_t group = first; group < last; group++) {
        int64_t word = fdb_words_before(shape, group), words = fdb_group_words(shape, group);
        for (int64_t column = 0; column < columns; column++)
            steps[group * columns + column] =
                kernel->table(x + (column * all_words + word) * FDB_WORD_INPUTS, words,
                              columns * kernel->table_bytes,
                              tables + (word * columns + column) * kernel->table_bytes);
    }
}

void fdb_make_product(const fdb_kernel* kernel, const fdb_shape* shape, const uint8_t* tiles,
                      const uint8_t* tables, const float* steps, int64_t columns, int64_t first,
                      int64_t last, float* y) {
    int64_t groups = fdb_groups(shape), stretch = fdb_stretch_groups(shape);
    int64_t block_floats = columns * FDB_BLOCK_ROWS;
    memset(y + first * block_floats, 0, (size_t)((last - first) * block_floats) * sizeof *y);
    for (int64_t from = 0; from < groups; from += stretch) {
        int64_t to = fdb_min(groups, from + stretch);
        for (int64_t block = first; block < last; block++)
            kernel->block(shape, tiles + fdb_block_offset(shape, from, to, block),
                          fdb_block_tiles(shape, block), from, to, tables, steps, columns,
                          y + block * block_floats);
    }
}
