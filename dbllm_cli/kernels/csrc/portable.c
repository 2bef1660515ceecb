/* Plain C: a table of the 256 sums of every 8 activations, in float32. */
#include <string.h>

#include "fdb.h"
#include "floats.h"

enum {
    BYTE_SUMS = 256,
    WORD_BYTES = FDB_WORD_INPUTS / 8,
    WORD_TABLE = WORD_BYTES * BYTE_SUMS * sizeof(float),
};

static float make_table(const float* inputs, int64_t words, int64_t stride, uint8_t* tables) {
    float probe = 0;
    for (int64_t word = 0; word < words; word++, tables += stride) {
        float* sums = (float*)tables;
        for (int byte = 0; byte < WORD_BYTES; byte++, inputs += 8, sums += BYTE_SUMS) {
            sums[0] = 0;
            for (int i = 0; i < 8; i++) {
                for (int v = 0; v < 1 << i; v++) sums[v + (1 << i)] = sums[v] + inputs[i];
                probe += inputs[i] * 0.0f; /* a plane may leave the sums out */
            }
        }
    }
    return 1.0f + probe;
}

static float word_sum(const float* sums, const uint8_t* plane, int64_t row) {
    uint32_t word;
    memcpy(&word, plane + row * 4, sizeof word);
    float low = sums[word & 255] + sums[BYTE_SUMS + (word >> 8 & 255)];
    float high = sums[2 * BYTE_SUMS + (word >> 16 & 255)] + sums[3 * BYTE_SUMS + (word >> 24)];
    return low + high;
}

/* One tile of one group for one column, whose tables lie `stride` bytes apart. */
static void add_tile(const uint8_t* tile, int64_t words, const uint8_t* tables, int64_t stride,
                     float step, float* y) {
    const uint8_t* scales = tile + words * 2 * FDB_PLANE_BYTES;
    for (int64_t row = 0; row < FDB_TILE_ROWS; row++) {
        float sum1 = 0, sum2 = 0;
        for (int64_t word = 0; word < words; word++) {
            int64_t even = word & ~(int64_t)1, pair = fdb_min(2, words - even);
            const uint8_t* plane = tile + (even * 2 + (word & 1)) * FDB_PLANE_BYTES;
            const float* sums = (const float*)(tables + word * stride);
            sum1 += word_sum(sums, plane, row);
            sum2 += word_sum(sums, plane + pair * FDB_PLANE_BYTES, row);
        }
        uint16_t alpha1, alpha2;
        memcpy(&alpha1, scales + row * 2, 2);
        memcpy(&alpha2, scales + FDB_SCALE_BYTES / 2 + row * 2, 2);
        y[row] += step * (fdb_from_float16(alpha1) * sum1 + fdb_from_float16(alpha2) * sum2);
    }
}

static void add_offsets(const uint8_t* halves, int64_t groups, const float* sums, int64_t columns,
                        float* y) {
    for (int64_t group = 0; group < groups; group++)
        for (int64_t row = 0; row < FDB_BLOCK_ROWS; row++) {
            uint16_t half;
            memcpy(&half, halves + (group * FDB_BLOCK_ROWS + row) * 2, 2);
            float beta = fdb_from_float16(half);
            for (int64_t c = 0; c < columns; c++)
                y[c * FDB_BLOCK_ROWS + row] += beta * sums[group * columns + c];
        }
}

static int always(void) { return 1; }

const fdb_kernel fdb_portable_exact = {"portable", WORD_TABLE, make_table,
                                       add_tile,   NULL,       add_offsets};
const fdb_instruction_set fdb_portable = {
    "portable",         &fdb_portable_exact, &fdb_portable_exact, int8_rows_portable,
    attention_portable, gated_silu_portable, &training_portable,  always};
