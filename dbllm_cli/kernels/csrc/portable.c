/* Plain C: a table of the 256 sums of every 8 activations, in float32. */
#include <string.h>

#include "fdb.h"
#include "floats.h"

enum { BYTE_SUMS = 256, WORD_BYTES = FDB_WORD_INPUTS / 8 };

static void make_tables(const fdb_shape *shape, const float *x, int64_t columns, int64_t first,
                        int64_t last, uint8_t *tables, float *steps) {
    int64_t words = fdb_words_before(shape, fdb_groups(shape));
    for (int64_t word = fdb_words_before(shape, first); word < fdb_words_before(shape, last);
         word++) {
        for (int64_t column = 0; column < columns; column++) {
            const float *inputs = x + (column * words + word) * FDB_WORD_INPUTS;
            float *sums = (float *)tables + (word * columns + column) * WORD_BYTES * BYTE_SUMS;
            for (int byte = 0; byte < WORD_BYTES; byte++, inputs += 8, sums += BYTE_SUMS) {
                sums[0] = 0;
                for (int i = 0; i < 8; i++)
                    for (int v = 0; v < 1 << i; v++) sums[v + (1 << i)] = sums[v] + inputs[i];
            }
        }
    }
    /* A sum of an input that is not finite is not finite either, but a plane may leave it out. */
    for (int64_t group = first; group < last; group++) {
        for (int64_t column = 0; column < columns; column++) {
            float probe = 0;
            for (int64_t i = fdb_words_before(shape, group) * FDB_WORD_INPUTS;
                 i < fdb_words_before(shape, group + 1) * FDB_WORD_INPUTS; i++)
                probe += x[column * words * FDB_WORD_INPUTS + i] * 0.0f;
            steps[group * columns + column] = 1.0f + probe;
        }
    }
}

static float word_sum(const float *sums, const uint8_t *plane, int64_t row) {
    uint32_t word;
    memcpy(&word, plane + row * 4, sizeof word);
    float low = sums[word & 255] + sums[BYTE_SUMS + (word >> 8 & 255)];
    float high = sums[2 * BYTE_SUMS + (word >> 16 & 255)] + sums[3 * BYTE_SUMS + (word >> 24)];
    return low + high;
}

/* Adds one tile's part to y[row] for one column; `word` is the group's first. */
static void add_tile(const fdb_shape *shape, const uint8_t *tile, const uint8_t *tables, float step,
                     int64_t columns, int64_t column, int64_t group, float *y) {
    int64_t word = fdb_words_before(shape, group), words = fdb_group_words(shape, group);
    const uint8_t *scales = tile + words * 2 * FDB_PLANE_BYTES;
    for (int64_t row = 0; row < FDB_TILE_ROWS; row++) {
        float sum1 = 0, sum2 = 0;
        const uint8_t *piece = tile;
        for (int64_t w = 0; w < words; w++) {
            int64_t pair = fdb_min(2, words - (w & ~(int64_t)1)); /* words of this piece */
            const float *sums =
                (const float *)tables + ((word + w) * columns + column) * WORD_BYTES * BYTE_SUMS;
            sum1 += word_sum(sums, piece + (w & 1) * FDB_PLANE_BYTES, row);
            sum2 += word_sum(sums, piece + (pair + (w & 1)) * FDB_PLANE_BYTES, row);
            if (w & 1) piece += 4 * FDB_PLANE_BYTES;
        }
        uint16_t alpha1, alpha2;
        memcpy(&alpha1, scales + row * 2, 2);
        memcpy(&alpha2, scales + FDB_SCALE_BYTES / 2 + row * 2, 2);
        y[row] += step * (fdb_from_float16(alpha1) * sum1 + fdb_from_float16(alpha2) * sum2);
    }
}

static void product(const fdb_shape *shape, const uint8_t *tiles, const uint8_t *tables,
                    const float *steps, int64_t columns, int64_t first, int64_t last, float *y) {
    int64_t groups = fdb_groups(shape), stretch = fdb_stretch_groups(shape);
    memset(y + first * columns * FDB_BLOCK_ROWS, 0,
           (size_t)((last - first) * columns * FDB_BLOCK_ROWS) * sizeof *y);
    for (int64_t from = 0; from < groups; from += stretch) {
        int64_t to = fdb_min(groups, from + stretch);
        for (int64_t block = first; block < last; block++) {
            const uint8_t *tile = tiles + fdb_block_offset(shape, from, to, block);
            for (int64_t group = from; group < to; group++)
                for (int64_t t = 0; t < fdb_block_tiles(shape, block); t++) {
                    for (int64_t c = 0; c < columns; c++)
                        add_tile(shape, tile, tables, steps[group * columns + c], columns, c, group,
                                 y + (block * columns + c) * FDB_BLOCK_ROWS + t * FDB_TILE_ROWS);
                    tile += fdb_tile_bytes(shape, group, group + 1);
                }
        }
    }
}

static int always(void) { return 1; }

const fdb_kernel fdb_portable_exact = {"portable", WORD_BYTES * BYTE_SUMS * sizeof(float),
                                       make_tables, product};
const fdb_instruction_set fdb_portable = {"portable", &fdb_portable_exact, &fdb_portable_exact,
                                          always};
