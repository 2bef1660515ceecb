/* AVX-512 with VBMI and VNNI: the activations of a group as 13-bit integers.
 *
 * For every 4 inputs there is a table of their 16 possible sums, low 7 bits and the rest in a byte
 * each; the nibble of a row's plane is the index. One vpermb looks 64 nibbles up, 4 of each of 16
 * rows, in 4 tables side by side; one vpdpbusd adds them into the rows' 32-bit sums.
 */
#include "avx512.h"

#if defined(__x86_64__)

enum { WORD_TABLE = 256, PREFETCH = 2560, LARGEST = 4095 };

/* -- tables ---------------------------------------------------------------------------------- */

/* From 32 integers, then the sums of their even-odd pairs (also 32): what bits 0 and 1 of an entry
 * add of a quad that begins at `q`, and what bits 2 and 3 add. Entry 0 of each is masked to zero.
 */
#define LOW_BITS(q) \
    0, q, q + 1, q + 32, 0, q, q + 1, q + 32, 0, q, q + 1, q + 32, 0, q, q + 1, q + 32
#define HIGH_BITS(q)                                                                            \
    0, 0, 0, 0, q + 2, q + 2, q + 2, q + 2, q + 3, q + 3, q + 3, q + 3, q + 34, q + 34, q + 34, \
        q + 34
static const int16_t low_bits[4][32] __attribute__((aligned(64))) = {
    {LOW_BITS(0), LOW_BITS(8)},
    {LOW_BITS(16), LOW_BITS(24)},
    {LOW_BITS(4), LOW_BITS(12)},
    {LOW_BITS(20), LOW_BITS(28)},
};
static const int16_t high_bits[4][32] __attribute__((aligned(64))) = {
    {HIGH_BITS(0), HIGH_BITS(8)},
    {HIGH_BITS(16), HIGH_BITS(24)},
    {HIGH_BITS(4), HIGH_BITS(12)},
    {HIGH_BITS(20), HIGH_BITS(28)},
};

/* Tables of one word: quads 0 2 4 6 low, the same high, quads 1 3 5 7 low, high; 64 bytes each. */
INLINE void word_tables(const float* x, __m512 factor, uint8_t* table) {
    __m256i first =
        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x), factor)));
    __m256i second =
        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + 16), factor)));
    __m512i q = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
    __m512i pairs = _mm512_add_epi16(q, _mm512_srli_epi32(q, 16));
#pragma GCC unroll 4
    for (int two = 0; two < 4; two++) {
        __m512i low =
            _mm512_maskz_permutex2var_epi16(0xEEEEEEEE, q, _mm512_load_si512(low_bits[two]), pairs);
        __m512i high = _mm512_maskz_permutex2var_epi16(0xFFF0FFF0, q,
                                                       _mm512_load_si512(high_bits[two]), pairs);
        __m512i sums = _mm512_add_epi16(low, high);
        uint8_t* to = table + (two >> 1) * 128 + (two & 1) * 32;
        __m512i rest = _mm512_and_si512(sums, _mm512_set1_epi16(127));
        _mm256_store_si256((__m256i*)to, _mm512_cvtepi16_epi8(rest));
        _mm256_store_si256((__m256i*)(to + 64), _mm512_cvtepi16_epi8(_mm512_srai_epi16(sums, 7)));
    }
}

TARGET static float make_table(const float* inputs, int64_t words, int64_t stride,
                               uint8_t* tables) {
    float factor, step = fdb_step(largest_magnitude(inputs, words), LARGEST, &factor);
    for (int64_t word = 0; word < words; word++)
        word_tables(inputs + word * FDB_WORD_INPUTS, _mm512_set1_ps(factor),
                    tables + word * stride);
    return step;
}

/* -- integer product --------------------------------------------------------------------------- */

typedef struct {
    __m512i even_low, even_high, odd_low, odd_high;
} word_table;

INLINE word_table load_table(const uint8_t* table) {
    return (word_table){_mm512_load_si512(table), _mm512_load_si512(table + 64),
                        _mm512_load_si512(table + 128), _mm512_load_si512(table + 192)};
}

/* Indices into 4 tables side by side: the low nibble of each byte and the byte's place. */
INLINE __m512i nibble_index(__m512i plane) {
    return _mm512_ternarylogic_epi32(plane, _mm512_set1_epi8(15), _mm512_set1_epi32(0x30201000),
                                     0xEA);
}

/* Two low parts of 7 bits fit a byte; high parts are signed and fill theirs. */
INLINE __m512i add_word(__m512i sum, __m512i even, __m512i odd, const word_table* t) {
    const __m512i one = _mm512_set1_epi8(1), rest = _mm512_set1_epi8((char)128);
    __m512i low = _mm512_add_epi8(_mm512_permutexvar_epi8(even, t->even_low),
                                  _mm512_permutexvar_epi8(odd, t->odd_low));
    sum = _mm512_dpbusd_epi32(sum, low, one);
    sum = _mm512_dpbusd_epi32(sum, rest, _mm512_permutexvar_epi8(even, t->even_high));
    return _mm512_dpbusd_epi32(sum, rest, _mm512_permutexvar_epi8(odd, t->odd_high));
}

INLINE __m512i add_plane_word(__m512i sum, const uint8_t* plane, const word_table* t) {
    __m512i bits = _mm512_loadu_si512(plane);
    return add_word(sum, nibble_index(bits), nibble_index(_mm512_srli_epi16(bits, 4)), t);
}

/* Adds a piece of 1 or 2 words of one tile. */
INLINE __m512 add_piece(__m512 y, const uint8_t* piece, const uint8_t* scales, int words,
                        const word_table* t, __m512 step) {
    __m512i zero = _mm512_setzero_si512();
    __m512i sum1 = add_plane_word(zero, piece, &t[0]);
    __m512i sum2 = add_plane_word(zero, piece + words * FDB_PLANE_BYTES, &t[0]);
    if (words == 2) {
        sum1 = add_plane_word(sum1, piece + FDB_PLANE_BYTES, &t[1]);
        sum2 = add_plane_word(sum2, piece + 3 * FDB_PLANE_BYTES, &t[1]);
    }
    __m512 part =
        _mm512_mul_ps(load_scales(scales + FDB_SCALE_BYTES / 2), _mm512_cvtepi32_ps(sum2));
    part = _mm512_fmadd_ps(load_scales(scales), _mm512_cvtepi32_ps(sum1), part);
    return _mm512_fmadd_ps(step, part, y);
}

/* One group of one block, one column. `count` is a constant where it is inlined. */
INLINE const uint8_t* add_group(const uint8_t* tile, int64_t words, const uint8_t* tables,
                                float step, int count, __m512* y) {
    int64_t scales = words * 2 * FDB_PLANE_BYTES, bytes = scales + FDB_SCALE_BYTES;
    for (int64_t word = 0; word < words; word += 2) {
        const uint8_t* table = tables + word * WORD_TABLE;
        word_table t[2] = {load_table(table)};
        int64_t at = word * 2 * FDB_PLANE_BYTES;
        if (words - word >= 2) {
            t[1] = load_table(table + WORD_TABLE);
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) {
                const uint8_t* p = tile + i * bytes;
                for (int line = 0; line < 5; line++)
                    _mm_prefetch((const char*)p + PREFETCH + line * 64, _MM_HINT_T0);
                y[i] = add_piece(y[i], p + at, p + scales, 2, t, _mm512_set1_ps(step));
            }
        } else {
#pragma GCC unroll 4
            for (int i = 0; i < count; i++) {
                const uint8_t* p = tile + i * bytes;
                y[i] = add_piece(y[i], p + at, p + scales, 1, t, _mm512_set1_ps(step));
            }
        }
    }
    return tile + count * bytes;
}

INLINE void block_one_column(const fdb_shape* shape, const uint8_t* tile, const uint8_t* tables,
                             const float* steps, int64_t from, int64_t to, int count, float* y) {
    __m512 sums[FDB_BLOCK_TILES] = {{0}};
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) sums[i] = _mm512_loadu_ps(y + i * FDB_TILE_ROWS);
    for (int64_t group = from; group < to; group++)
        tile = add_group(tile, fdb_group_words(shape, group),
                         tables + fdb_words_before(shape, group) * WORD_TABLE, steps[group], count,
                         sums);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) _mm512_storeu_ps(y + i * FDB_TILE_ROWS, sums[i]);
}

/* One tile of one group for many columns: the indices are made once. */
INLINE void tile_columns(const uint8_t* tile, int64_t words, const uint8_t* tables,
                         const float* steps, int64_t columns, float* y) {
    const uint8_t* scales = tile + words * 2 * FDB_PLANE_BYTES;
    __m512 alpha1 = load_scales(scales), alpha2 = load_scales(scales + FDB_SCALE_BYTES / 2);
    for (int64_t word = 0; word < words; word += 2) {
        int64_t pair = fdb_min(2, words - word);
        const uint8_t* piece = tile + word * 2 * FDB_PLANE_BYTES;
        __m512i even[4], odd[4]; /* b1 of the first word, of the second, b2 of each */
        for (int64_t i = 0; i < 4; i++) {
            __m512i bits =
                (i & 1) < pair
                    ? _mm512_loadu_si512(piece + ((i >> 1) * pair + (i & 1)) * FDB_PLANE_BYTES)
                    : _mm512_setzero_si512();
            even[i] = nibble_index(bits);
            odd[i] = nibble_index(_mm512_srli_epi16(bits, 4));
        }
        const uint8_t* first = tables + word * columns * WORD_TABLE;
        const uint8_t* second = first + (pair - 1) * columns * WORD_TABLE;
        for (int64_t c = 0; c < columns; c++) {
            word_table t = load_table(first + c * WORD_TABLE),
                       u = load_table(second + c * WORD_TABLE);
            __m512i zero = _mm512_setzero_si512();
            /* Entry 0 of every table is 0: a word that is not there adds nothing. */
            __m512i sum1 = add_word(add_word(zero, even[0], odd[0], &t), even[1], odd[1], &u);
            __m512i sum2 = add_word(add_word(zero, even[2], odd[2], &t), even[3], odd[3], &u);
            __m512 part = _mm512_mul_ps(alpha2, _mm512_cvtepi32_ps(sum2));
            part = _mm512_fmadd_ps(alpha1, _mm512_cvtepi32_ps(sum1), part);
            float* to = y + c * FDB_BLOCK_ROWS;
            _mm512_storeu_ps(to,
                             _mm512_fmadd_ps(_mm512_set1_ps(steps[c]), part, _mm512_loadu_ps(to)));
        }
    }
}

INLINE void block_columns(const fdb_shape* shape, const uint8_t* tile, const uint8_t* tables,
                          const float* steps, int64_t columns, int64_t from, int64_t to,
                          int64_t count, float* y) {
    for (int64_t group = from; group < to; group++) {
        int64_t words = fdb_group_words(shape, group);
        for (int64_t i = 0; i < count; i++) {
            tile_columns(tile, words,
                         tables + fdb_words_before(shape, group) * columns * WORD_TABLE,
                         steps + group * columns, columns, y + i * FDB_TILE_ROWS);
            tile += fdb_tile_bytes(shape, group, group + 1);
        }
    }
}

TARGET static void add_block(const fdb_shape* shape, const uint8_t* tiles, int64_t count,
                             int64_t from, int64_t to, const uint8_t* tables, const float* steps,
                             int64_t columns, float* y) {
    if (columns > 1)
        block_columns(shape, tiles, tables, steps, columns, from, to, count, y);
    else if (count == FDB_BLOCK_TILES)
        block_one_column(shape, tiles, tables, steps, from, to, FDB_BLOCK_TILES, y);
    else
        /* Fewer: said so that the compiler sees it. */
        block_one_column(shape, tiles, tables, steps, from, to, (int)count % FDB_BLOCK_TILES, y);
}

const fdb_kernel fdb_avx512_integer = {"avx512", WORD_TABLE, make_table,
                                       NULL,     add_block,  add_offsets};

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("fma");
}

const fdb_instruction_set fdb_avx512 = {
    "avx512",         &fdb_avx512_integer, &fdb_avx512_exact, int8_rows_avx512,
    attention_avx512, gated_silu_avx512,   &training_avx512,  supported};

#else
static int supported(void) { return 0; }
const fdb_instruction_set fdb_avx512 = {"avx512", 0, 0, 0, 0, 0, 0, supported};
#endif
