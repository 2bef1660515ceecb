/* AVX2: the activations of a group as 12-bit integers.
 *
 * For every 4 inputs there is a table of their 16 possible sums, 14 bits above zero by a bias, as
 * two times 7 bits. Two tiles at once: their words are transposed so that one register holds the
 * same byte of 32 rows; vpshufb looks 32 nibbles up. Bytes are added in pairs, then in 16 bits.
 */
#include "avx2.h"

#if defined(__x86_64__)

enum { WORD_TABLE = 256, PREFETCH = 2560, LARGEST = 2047, BIAS = 8192 };

/* -- tables ---------------------------------------------------------------------------------- */

/* The 16 biased sums of 4 integers, which are the first in `quad`, then the sums of the first two
 * and of the last two: low 7 bits, then high 7 bits, 16 bytes each. */
INLINE void quad_table(__m128i quad, uint8_t* table) {
    const __m256i low_bits = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-1, -1, 0, 1, 2, 3, 8, 9, -1, -1, 0, 1, 2, 3, 8, 9));
    const __m256i high_bits =
        _mm256_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7,
                         6, 7, 10, 11, 10, 11, 10, 11, 10, 11);
    __m256i both = _mm256_broadcastsi128_si256(quad);
    __m256i sums =
        _mm256_add_epi16(_mm256_shuffle_epi8(both, low_bits), _mm256_shuffle_epi8(both, high_bits));
    sums = _mm256_add_epi16(sums, _mm256_set1_epi16(BIAS));
    __m256i low = _mm256_and_si256(sums, _mm256_set1_epi16(127));
    __m256i bytes = _mm256_packus_epi16(low, _mm256_srli_epi16(sums, 7));
    _mm256_storeu_si256((__m256i*)table, _mm256_permute4x64_epi64(bytes, 0xD8));
}

INLINE void word_tables(const float* x, __m256 factor, uint8_t* table) {
    for (int i = 0; i < FDB_WORD_INPUTS; i += 8, table += 64) {
        __m256i wide = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor));
        __m128i q =
            _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        __m128i pairs = _mm_hadd_epi16(q, q);
        quad_table(_mm_unpacklo_epi64(q, pairs), table);
        quad_table(_mm_unpackhi_epi64(q, _mm_srli_epi64(pairs, 32)), table + 32);
    }
}

TARGET static float make_table(const float* inputs, int64_t words, int64_t stride,
                               uint8_t* tables) {
    float factor, step = fdb_step(largest_magnitude(inputs, words), LARGEST, &factor);
    for (int64_t word = 0; word < words; word++)
        word_tables(inputs + word * FDB_WORD_INPUTS, _mm256_set1_ps(factor),
                    tables + word * stride);
    return step;
}

/* -- product -- */

/* Sums in 16 bits: of every byte taken as pairs, and of the odd bytes; 7 low bits, 7 high bits. */
typedef struct {
    __m256i low, low_odd, high, high_odd;
} pair_sums;

INLINE void add_bytes(__m256i bytes, __m256i* all, __m256i* odd) {
    *all = _mm256_add_epi16(*all, bytes);
    *odd = _mm256_add_epi16(*odd, _mm256_srli_epi16(bytes, 8));
}

INLINE __m256i quad_entries(const uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
}

/* One byte of 32 rows: two quads. */
INLINE void add_two_quads(__m256i bytes, const uint8_t* table, pair_sums* sums) {
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i even = _mm256_and_si256(bytes, nibble);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
    __m256i low = _mm256_add_epi8(_mm256_shuffle_epi8(quad_entries(table), even),
                                  _mm256_shuffle_epi8(quad_entries(table + 32), odd));
    __m256i high = _mm256_add_epi8(_mm256_shuffle_epi8(quad_entries(table + 16), even),
                                   _mm256_shuffle_epi8(quad_entries(table + 48), odd));
    add_bytes(low, &sums->low, &sums->low_odd);
    add_bytes(high, &sums->high, &sums->high_odd);
}

INLINE __m256i load_rows(const uint8_t* plane, int half) {
    /* Byte j of 4 rows becomes dword j of each half of the register. */
    const __m256i order = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256i rows = _mm256_loadu_si256((const __m256i*)(plane + half * 32));
    return _mm256_shuffle_epi8(rows, order);
}

/* One word of one plane of two tiles. */
INLINE void add_word(const uint8_t* tile, const uint8_t* next, const uint8_t* table,
                     pair_sums* sums) {
    __m256i a = load_rows(tile, 0), b = load_rows(tile, 1);
    __m256i c = load_rows(next, 0), d = load_rows(next, 1);
    __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
    add_two_quads(_mm256_unpacklo_epi64(ab, cd), table, sums);
    add_two_quads(_mm256_unpackhi_epi64(ab, cd), table + 64, sums);
    ab = _mm256_unpackhi_epi32(a, b), cd = _mm256_unpackhi_epi32(c, d);
    add_two_quads(_mm256_unpacklo_epi64(ab, cd), table + 128, sums);
    add_two_quads(_mm256_unpackhi_epi64(ab, cd), table + 192, sums);
}

/* low + 128 (high - bias), of 8 rows of the first or second tile. */
INLINE __m256 joined(__m256i low, __m256i high, int second) {
    const __m256i weights = _mm256_set1_epi32(128 << 16 | 1);
    __m256i pairs = second ? _mm256_unpackhi_epi16(low, high) : _mm256_unpacklo_epi16(low, high);
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, weights));
}

/* The sums of both tiles, 16 rows each, in order. */
INLINE void finish(const pair_sums* sums, int quads, __m256* rows) {
    __m256i bias = _mm256_set1_epi16((int16_t)(quads * (BIAS >> 7)));
    __m256i low = _mm256_sub_epi16(sums->low, _mm256_slli_epi16(sums->low_odd, 8));
    __m256i high = _mm256_sub_epi16(sums->high, _mm256_slli_epi16(sums->high_odd, 8));
    high = _mm256_sub_epi16(high, bias);
    __m256i high_odd = _mm256_sub_epi16(sums->high_odd, bias);
    for (int tile = 0; tile < 2; tile++) {
        __m256 even = joined(low, high, tile), odd = joined(sums->low_odd, high_odd, tile);
        rows[2 * tile] = _mm256_unpacklo_ps(even, odd);
        rows[2 * tile + 1] = _mm256_unpackhi_ps(even, odd);
    }
}

/* One piece (1 or 2 words) of a group for two tiles; `scales` is where a tile's scales begin. */
INLINE void add_piece(const uint8_t* tile, const uint8_t* next, int64_t at, int64_t scales,
                      int words, const uint8_t* table, int64_t table_stride, float step,
                      __m256* y) {
    __m256 rows[2][4];
    for (int plane = 0; plane < 2; plane++) {
        pair_sums sums = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                          _mm256_setzero_si256()};
        for (int word = 0; word < words; word++) {
            int64_t line = at + (plane * words + word) * FDB_PLANE_BYTES;
            add_word(tile + line, next + line, table + word * table_stride, &sums);
        }
        finish(&sums, words * 8, rows[plane]);
    }
    for (int i = 0; i < 4; i++) {
        const uint8_t* halves = (i < 2 ? tile : next) + scales + (i & 1) * 16;
        __m256 part = _mm256_mul_ps(load_scales(halves + FDB_SCALE_BYTES / 2), rows[1][i]);
        part = _mm256_fmadd_ps(load_scales(halves), rows[0][i], part);
        y[i] = _mm256_fmadd_ps(_mm256_set1_ps(step), part, y[i]);
    }
}

/* One group of two tiles (or one twice) for one column, whose tables lie `stride` apart. */
INLINE void add_group(const uint8_t* tile, const uint8_t* next, int64_t words,
                      const uint8_t* tables, int64_t stride, float step, float* y) {
    int64_t scales = words * 2 * FDB_PLANE_BYTES;
    __m256 sums[4];
    for (int i = 0; i < 4; i++) sums[i] = _mm256_loadu_ps(y + 8 * i);
    for (int64_t w = 0; w < words; w += 2) {
        int64_t at = w * 2 * FDB_PLANE_BYTES;
        if (words - w >= 2)
            add_piece(tile, next, at, scales, 2, tables + w * stride, stride, step, sums);
        else
            add_piece(tile, next, at, scales, 1, tables + w * stride, stride, step, sums);
    }
    for (int i = 0; i < 4; i++) _mm256_storeu_ps(y + 8 * i, sums[i]);
}

TARGET static void add_block(const fdb_shape* shape, const uint8_t* tiles, int64_t count,
                             int64_t from, int64_t to, const uint8_t* tables, const float* steps,
                             int64_t columns, float* y) {
    int64_t stride = columns * WORD_TABLE;
    for (int64_t group = from; group < to; group++) {
        int64_t words = fdb_group_words(shape, group);
        int64_t bytes = fdb_tile_bytes(shape, group, group + 1);
        const uint8_t* own = tables + fdb_words_before(shape, group) * stride;
        for (int64_t i = 0; i < count; i += 2) {
            const uint8_t* next = i + 1 < count ? tiles + bytes : tiles;
            for (int64_t line = 0; line < 2 * bytes; line += 64)
                _mm_prefetch((const char*)tiles + PREFETCH + line, _MM_HINT_T0);
            for (int64_t c = 0; c < columns; c++)
                add_group(tiles, next, words, own + c * WORD_TABLE, stride,
                          steps[group * columns + c], y + c * FDB_BLOCK_ROWS + i * FDB_TILE_ROWS);
            tiles = next + bytes;
        }
    }
}

const fdb_kernel fdb_avx2_integer = {"avx2", WORD_TABLE, make_table, NULL, add_block, add_offsets};

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}

const fdb_instruction_set fdb_avx2 = {"avx2",         &fdb_avx2_integer, &fdb_avx2_exact,
                                      int8_rows_avx2, attention_avx2,    gated_silu_avx2,
                                      &training_avx2, supported};

#else
static int supported(void) { return 0; }
const fdb_instruction_set fdb_avx2 = {"avx2", 0, 0, 0, 0, 0, 0, supported};
#endif
