/* AVX2, exact: tables of the 16 sums of every 4 activations in float32, looked up by two vpermps.
 */
#include "avx2.h"

#if defined(__x86_64__)

enum { WORD_TABLE = 512 };

TARGET static float make_table(const float* inputs, int64_t words, int64_t stride,
                               uint8_t* tables) {
    float bad = largest_magnitude(inputs, words) * 0.0f;
    for (int64_t quad = 0; quad < words * 8; quad++, inputs += 4) {
        float* sums = (float*)(tables + quad / 8 * stride) + quad % 8 * 16;
        sums[0] = 0;
        for (int i = 0; i < 4; i++)
            for (int v = 0; v < 1 << i; v++) sums[v + (1 << i)] = sums[v] + inputs[i];
    }
    return 1.0f + bad;
}

/* One quad of 8 rows, whose nibble is the lowest of each word. */
INLINE __m256 look_up(__m256i words, __m256 first, __m256 second) {
    __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, words),
                            _mm256_permutevar8x32_ps(second, words), upper);
}

INLINE void add_word(const uint8_t* plane1, const uint8_t* plane2, const uint8_t* table,
                     __m256* sums1, __m256* sums2) {
    __m256i bits1[2], bits2[2];
    for (int half = 0; half < 2; half++) {
        bits1[half] = _mm256_loadu_si256((const __m256i*)(plane1 + half * 32));
        bits2[half] = _mm256_loadu_si256((const __m256i*)(plane2 + half * 32));
    }
    for (int quad = 0; quad < 8; quad++) {
        const float* sums = (const float*)table + quad * 16;
        __m256 first = _mm256_loadu_ps(sums), second = _mm256_loadu_ps(sums + 8);
        for (int half = 0; half < 2; half++) {
            sums1[half] = _mm256_add_ps(sums1[half], look_up(bits1[half], first, second));
            sums2[half] = _mm256_add_ps(sums2[half], look_up(bits2[half], first, second));
            bits1[half] = _mm256_srli_epi32(bits1[half], 4);
            bits2[half] = _mm256_srli_epi32(bits2[half], 4);
        }
    }
}

/* One tile of one group for one column, whose tables lie `stride` bytes apart. */
TARGET static void add_tile(const uint8_t* tile, int64_t words, const uint8_t* tables,
                            int64_t stride, float step, float* y) {
    const uint8_t* scales = tile + words * 2 * FDB_PLANE_BYTES;
    __m256 sums1[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    __m256 sums2[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t word = 0; word < words; word++) {
        int64_t even = word & ~(int64_t)1, pair = fdb_min(2, words - even);
        const uint8_t* plane = tile + (even * 2 + (word & 1)) * FDB_PLANE_BYTES;
        add_word(plane, plane + pair * FDB_PLANE_BYTES, tables + word * stride, sums1, sums2);
    }
    for (int half = 0; half < 2; half++) {
        const uint8_t* halves = scales + half * 16;
        __m256 part = _mm256_mul_ps(load_scales(halves + FDB_SCALE_BYTES / 2), sums2[half]);
        part = _mm256_fmadd_ps(load_scales(halves), sums1[half], part);
        float* to = y + half * 8;
        _mm256_storeu_ps(to, _mm256_fmadd_ps(_mm256_set1_ps(step), part, _mm256_loadu_ps(to)));
    }
}

const fdb_kernel fdb_avx2_exact = {"avx2-exact", WORD_TABLE, make_table,
                                   add_tile,     NULL,       add_offsets};

#endif
