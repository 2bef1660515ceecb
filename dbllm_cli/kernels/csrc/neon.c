/* NEON (any 64-bit ARM): the activations of a group as 13-bit integers.
 *
 * As in avx512.c, with tables of the 16 sums of every 4 activations, 4 of them side by side for one
 * tbl over 64 bytes; sadalp adds the looked-up bytes of a row in pairs.
 */
#include "fdb.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#include <math.h>
#include <string.h>

enum { WORD_TABLE = 256, LARGEST = 4095, LANES = 4, PARTS = FDB_TILE_ROWS / LANES };

/* -- tables ---------------------------------------------------------------------------------- */

/* Tables of one word: quads 0 2 4 6 low 7 bits, the same high, quads 1 3 5 7 low, high. */
static void word_tables(const float* x, float factor, uint8_t* table) {
    for (int quad = 0; quad < 8; quad++, x += 4) {
        int16_t sums[16] = {0};
        uint8_t* to = table + (quad & 1) * 128 + (quad >> 1) * 16;
        for (int i = 0; i < 4; i++) {
            int16_t q = (int16_t)lrintf(x[i] * factor);
            for (int v = 0; v < 1 << i; v++) sums[v + (1 << i)] = (int16_t)(sums[v] + q);
        }
        for (int v = 0; v < 16; v++) {
            to[v] = (uint8_t)(sums[v] & 127);
            to[64 + v] = (uint8_t)(sums[v] >> 7);
        }
    }
}

static float make_table(const float* inputs, int64_t words, int64_t stride, uint8_t* tables) {
    float factor,
        step = fdb_step(fdb_largest_magnitude(inputs, words * FDB_WORD_INPUTS), LARGEST, &factor);
    for (int64_t word = 0; word < words; word++)
        word_tables(inputs + word * FDB_WORD_INPUTS, factor, tables + word * stride);
    return step;
}

/* -- product -- */

typedef struct {
    int16x8_t low, high; /* two lanes a row */
} row_sums;

static inline void add_lookup(row_sums* sums, uint8x16_t index, const uint8_t* table) {
    uint8x16x4_t low = vld1q_u8_x4(table), high = vld1q_u8_x4(table + 64);
    sums->low = vpadalq_s8(sums->low, vreinterpretq_s8_u8(vqtbl4q_u8(low, index)));
    sums->high = vpadalq_s8(sums->high, vreinterpretq_s8_u8(vqtbl4q_u8(high, index)));
}

/* One word of one plane of 4 rows. */
static inline void add_word(row_sums* sums, const uint8_t* plane, const uint8_t* table) {
    const uint8x16_t place = vreinterpretq_u8_u32(vdupq_n_u32(0x30201000));
    uint8x16_t bits = vld1q_u8(plane);
    add_lookup(sums, vorrq_u8(vandq_u8(bits, vdupq_n_u8(15)), place), table);
    add_lookup(sums, vorrq_u8(vshrq_n_u8(bits, 4), place), table + 128);
}

static inline float32x4_t total(row_sums sums) {
    int32x4_t high = vshlq_n_s32(vpaddlq_s16(sums.high), 7);
    return vcvtq_f32_s32(vaddq_s32(vpaddlq_s16(sums.low), high));
}

static inline float32x4_t load_scales(const uint8_t* halves) {
    return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(halves)));
}

/* One tile of one group for one column, whose tables lie `stride` bytes apart. */
static void add_tile(const uint8_t* tile, int64_t words, const uint8_t* tables, int64_t stride,
                     float step, float* y) {
    const uint8_t* scales = tile + words * 2 * FDB_PLANE_BYTES;
    for (int part = 0; part < PARTS; part++) {
        float32x4_t parts = vdupq_n_f32(0);
        for (int64_t word = 0; word < words; word += 2) {
            int64_t pair = fdb_min(2, words - word);
            const uint8_t* piece = tile + word * 2 * FDB_PLANE_BYTES + part * 16;
            for (int plane = 0; plane < 2; plane++) {
                row_sums sums = {vdupq_n_s16(0), vdupq_n_s16(0)};
                for (int64_t w = 0; w < pair; w++)
                    add_word(&sums, piece + (plane * pair + w) * FDB_PLANE_BYTES,
                             tables + (word + w) * stride);
                const uint8_t* halves = scales + plane * FDB_SCALE_BYTES / 2 + part * 8;
                parts = vfmaq_f32(parts, load_scales(halves), total(sums));
            }
        }
        float* to = y + part * LANES;
        vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), parts, step));
    }
}

static void add_offsets(const uint8_t* halves, int64_t groups, const float* sums, int64_t columns,
                        float* y) {
    for (int64_t c = 0; c < columns; c++)
        for (int64_t row = 0; row < FDB_BLOCK_ROWS; row += LANES) {
            float* to = y + c * FDB_BLOCK_ROWS + row;
            float32x4_t total = vld1q_f32(to);
            for (int64_t group = 0; group < groups; group++)
                total = vfmaq_n_f32(total, load_scales(halves + (group * FDB_BLOCK_ROWS + row) * 2),
                                    sums[group * columns + c]);
            vst1q_f32(to, total);
        }
}

static int supported(void) { return 1; }
static const fdb_kernel integer = {"neon", WORD_TABLE, make_table, add_tile, NULL, add_offsets};
const fdb_instruction_set fdb_neon = {"neon",
                                      &integer,
                                      &fdb_portable_exact,
                                      int8_rows_portable,
                                      attention_portable,
                                      gated_silu_portable,
                                      &training_portable,
                                      supported};

#else
static int supported(void) { return 0; }
const fdb_instruction_set fdb_neon = {"neon", 0, 0, 0, 0, 0, 0, supported};
#endif
