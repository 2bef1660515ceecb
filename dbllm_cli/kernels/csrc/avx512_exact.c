/* AVX-512, exact: tables of the 16 sums of every 4 activations in float32, looked up by vpermps. */
#include "avx512.h"

#if defined(__x86_64__)

enum { WORD_TABLE = 512 };

TARGET static float make_table(const float* inputs, int64_t words, int64_t stride,
                               uint8_t* tables) {
    float bad = largest_magnitude(inputs, words) * 0.0f;
    for (int64_t quad = 0; quad < words * 8; quad++, inputs += 4) {
        __m512 sums = _mm512_maskz_mov_ps(0xAAAA, _mm512_set1_ps(inputs[0]));
        sums = _mm512_mask_add_ps(sums, 0xCCCC, sums, _mm512_set1_ps(inputs[1]));
        sums = _mm512_mask_add_ps(sums, 0xF0F0, sums, _mm512_set1_ps(inputs[2]));
        sums = _mm512_mask_add_ps(sums, 0xFF00, sums, _mm512_set1_ps(inputs[3]));
        _mm512_storeu_ps((float*)(tables + quad / 8 * stride) + quad % 8 * 16, sums);
    }
    return 1.0f + bad;
}

/* Adds one word of `count` tiles; sums holds those of b1 and then of b2. */
INLINE void add_exact_word(const uint8_t* plane1, const uint8_t* plane2, int64_t bytes,
                           const uint8_t* table, int count, __m512* sums1, __m512* sums2) {
    __m512i bits1[FDB_BLOCK_TILES], bits2[FDB_BLOCK_TILES];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        bits1[i] = _mm512_loadu_si512(plane1 + i * bytes);
        bits2[i] = _mm512_loadu_si512(plane2 + i * bytes);
    }
#pragma GCC unroll 1
    for (int quad = 0; quad < 8; quad++) {
        __m512 t = _mm512_loadu_ps((const float*)table + quad * 16);
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            sums1[i] = _mm512_add_ps(sums1[i], _mm512_permutexvar_ps(bits1[i], t));
            sums2[i] = _mm512_add_ps(sums2[i], _mm512_permutexvar_ps(bits2[i], t));
            bits1[i] = _mm512_srli_epi32(bits1[i], 4);
            bits2[i] = _mm512_srli_epi32(bits2[i], 4);
        }
    }
}

/* One group of one block for one column, whose tables lie `columns` apart. */
INLINE void add_exact_group(const uint8_t* tile, int64_t words, const uint8_t* tables,
                            int64_t columns, float step, int count, float* y) {
    int64_t scales = words * 2 * FDB_PLANE_BYTES, bytes = scales + FDB_SCALE_BYTES;
    __m512 sums1[FDB_BLOCK_TILES] = {{0}}, sums2[FDB_BLOCK_TILES] = {{0}};
    for (int64_t word = 0; word < words; word++) {
        int64_t even = word & ~(int64_t)1, pair = fdb_min(2, words - even);
        const uint8_t* plane = tile + (even * 2 + (word & 1)) * FDB_PLANE_BYTES;
        add_exact_word(plane, plane + pair * FDB_PLANE_BYTES, bytes,
                       tables + word * columns * WORD_TABLE, count, sums1, sums2);
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        const uint8_t* halves = tile + i * bytes + scales;
        __m512 part = _mm512_mul_ps(load_scales(halves + FDB_SCALE_BYTES / 2), sums2[i]);
        part = _mm512_fmadd_ps(load_scales(halves), sums1[i], part);
        float* to = y + i * FDB_TILE_ROWS;
        _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_set1_ps(step), part, _mm512_loadu_ps(to)));
    }
}

TARGET static void add_block(const fdb_shape* shape, const uint8_t* tiles, int64_t count,
                             int64_t from, int64_t to, const uint8_t* tables, const float* steps,
                             int64_t columns, float* y) {
    for (int64_t group = from; group < to; group++) {
        int64_t words = fdb_group_words(shape, group);
        const uint8_t* table = tables + fdb_words_before(shape, group) * columns * WORD_TABLE;
        for (int64_t c = 0; c < columns; c++, table += WORD_TABLE) {
            float *out = y + c * FDB_BLOCK_ROWS, step = steps[group * columns + c];
            if (count == FDB_BLOCK_TILES)
                add_exact_group(tiles, words, table, columns, step, FDB_BLOCK_TILES, out);
            else
                add_exact_group(tiles, words, table, columns, step, (int)count, out);
        }
        tiles += count * fdb_tile_bytes(shape, group, group + 1);
    }
}

const fdb_kernel fdb_avx512_exact = {"avx512-exact", WORD_TABLE, make_table,
                                     NULL,           add_block,  add_offsets};

#endif
