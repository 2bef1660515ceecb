/* The packed product on a CPU: y = alpha1 (b1 x) + alpha2 (b2 x) + beta (1 x), over weights laid
 * out in tiles.
 *
 * Nothing here knows of torch or of threads: a caller makes the tables of its activations, then
 * calls the product for ranges of blocks of rows, from as many threads as it likes.
 *
 * Layout. A tile is TILE_ROWS rows of one group: for every 64 inputs of the group (the last piece
 * may hold 32) plane b1 of the first 32 inputs, one 32-bit word a row, b1 of the second 32, b2 of
 * the first, b2 of the second; then alpha1 and alpha2 of the rows in float16. Input i of a word is
 * bit i. Tiles follow each other in the order: stretch of groups (FDB_STRETCH_INPUTS inputs), block
 * of FDB_BLOCK_TILES tiles, group of the stretch, tile of the block. Rows beyond the last are zero;
 * so are inputs beyond the last, of which a short last group has fewer than 32.
 *
 * Where the groups have an offset beta, all tiles are followed by the offsets in float16, for every
 * block of FDB_BLOCK_ROWS rows those of its rows group by group.
 */
#ifndef DBLLM_FDB_H
#define DBLLM_FDB_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "decode.h"
#include "int8.h"
#include "training.h"

/* What Python calls; all else stays inside the library. */
#define EXPORT __attribute__((visibility("default")))

enum {
    FDB_TILE_ROWS = 16,
    FDB_BLOCK_TILES = 4,
    FDB_BLOCK_ROWS = FDB_TILE_ROWS * FDB_BLOCK_TILES,
    FDB_WORD_INPUTS = 32,
    FDB_STRETCH_INPUTS = 512, /* so that the tables of a stretch stay in the first-level cache */
    FDB_PLANE_BYTES = FDB_TILE_ROWS * 4,
    FDB_SCALE_BYTES = FDB_TILE_ROWS * 4,
    FDB_MAX_COLUMNS = 32, /* columns of one call of a product */
};

enum { FDB_LAYOUT = 3 }; /* to be raised with every change of the layout; cpu.py has it too */

#define FDB_SMALLEST 0x1p-100f

typedef struct {
    int64_t in_features;
    int64_t out_features;
    int64_t group_size; /* a multiple of 32 */
} fdb_shape;

static inline int64_t fdb_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t fdb_min(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t fdb_groups(const fdb_shape* s) {
    return fdb_ceil_div(s->in_features, s->group_size);
}
static inline int64_t fdb_tiles(const fdb_shape* s) {
    return fdb_ceil_div(s->out_features, FDB_TILE_ROWS);
}
static inline int64_t fdb_blocks(const fdb_shape* s) {
    return fdb_ceil_div(fdb_tiles(s), FDB_BLOCK_TILES);
}
static inline int64_t fdb_stretch_groups(const fdb_shape* s) {
    return s->group_size < FDB_STRETCH_INPUTS ? FDB_STRETCH_INPUTS / s->group_size : 1;
}
/* Words of 32 inputs from the first group up to `group`. */
static inline int64_t fdb_words_before(const fdb_shape* s, int64_t group) {
    int64_t inputs = fdb_min(group * s->group_size, s->in_features);
    return fdb_ceil_div(inputs, FDB_WORD_INPUTS);
}
static inline int64_t fdb_group_words(const fdb_shape* s, int64_t group) {
    return fdb_words_before(s, group + 1) - fdb_words_before(s, group);
}
/* Bytes of one tile of every group from `first` up to `last`. */
static inline int64_t fdb_tile_bytes(const fdb_shape* s, int64_t first, int64_t last) {
    int64_t words = fdb_words_before(s, last) - fdb_words_before(s, first);
    return words * 2 * FDB_PLANE_BYTES + (last - first) * FDB_SCALE_BYTES;
}
/* Where the tiles of a block begin in the stretch of groups `first` up to `last`. */
static inline int64_t fdb_block_offset(const fdb_shape* s, int64_t first, int64_t last,
                                       int64_t block) {
    return fdb_tiles(s) * fdb_tile_bytes(s, 0, first) +
           block * FDB_BLOCK_TILES * fdb_tile_bytes(s, first, last);
}
/* Where the offsets begin. */
static inline int64_t fdb_offsets_start(const fdb_shape* s) {
    return fdb_tiles(s) * fdb_tile_bytes(s, 0, fdb_groups(s));
}
static inline int64_t fdb_block_tiles(const fdb_shape* s, int64_t block) {
    return fdb_min(FDB_BLOCK_TILES, fdb_tiles(s) - block * FDB_BLOCK_TILES);
}

/* The step of integers up to `top` for inputs up to `largest` (NaN for ones that are not finite),
 * and what an input is multiplied by to be an integer. */
static inline float fdb_step(float largest, int top, float* factor) {
    *factor = largest >= FDB_SMALLEST ? (float)top / largest : 0;
    return largest < FDB_SMALLEST ? 0 : largest / (float)top;
}

/* Largest magnitude of `count` numbers, NaN if one is not finite; kernels may have a faster one. */
static inline float fdb_largest_magnitude(const float* x, int64_t count) {
    float largest = 0, bad = 0;
    for (int64_t i = 0; i < count; i++) {
        float magnitude = fabsf(x[i]);
        largest = magnitude > largest ? magnitude : largest;
        bad += x[i] * 0.0f;
    }
    return largest + bad;
}

/* One way to make the product, for one instruction set.
 *
 * `table_bytes`: of one word of 32 inputs of one column.
 *
 * `table`: from the inputs of one group and column (words * 32, zero beyond in_features) their
 *   tables, `stride` bytes from word to word, aligned to 64 bytes; returns the step. An entry of a
 *   table times the step is a sum of activations. A group with an input that is not finite gets
 *   the step NaN, so that the product is NaN too. The caller lifts columns of tiny inputs: groups
 *   below FDB_SMALLEST count as zero.
 *
 * `tile`: adds one tile of one group to y [FDB_TILE_ROWS] of one column, whose tables lie `stride`
 *   bytes from word to word.
 *
 * `block`, in place of `tile`: adds the groups `from` up to `to` (one stretch) of a block of
 * `count` tiles to y [column][FDB_BLOCK_ROWS]; tables [word][column], steps [group][column].
 *
 * `offsets`: adds the offsets of a block, float16 [group][FDB_BLOCK_ROWS], times the sums of its
 *   inputs [group][column] to y [column][FDB_BLOCK_ROWS].
 */
typedef struct {
    const char* name;
    int64_t table_bytes;
    float (*table)(const float* inputs, int64_t words, int64_t stride, uint8_t* tables);
    void (*tile)(const uint8_t* tile, int64_t words, const uint8_t* tables, int64_t stride,
                 float step, float* y);
    void (*block)(const fdb_shape* shape, const uint8_t* tiles, int64_t count, int64_t from,
                  int64_t to, const uint8_t* tables, const float* steps, int64_t columns, float* y);
    void (*offsets)(const uint8_t* halves, int64_t groups, const float* sums, int64_t columns,
                    float* y);
} fdb_kernel;

/* What a product needs of its inputs, of every group and column. */
typedef struct {
    uint8_t* tables;
    float *steps, *sums; /* [group][column]; sums where a matrix has offsets, or NULL */
} fdb_inputs;

/* The inputs x [columns][words * 32] of the groups `first` up to `last`. */
void fdb_make_inputs(const fdb_kernel* kernel, const fdb_shape* shape, const float* x,
                     int64_t columns, int64_t first, int64_t last, const fdb_inputs* inputs);

/* y [block][column][FDB_BLOCK_ROWS] for the blocks `first` up to `last`; the same bytes for any
 * division into ranges. `offsets`: behind the tiles, or NULL. */
void fdb_make_product(const fdb_kernel* kernel, const fdb_shape* shape, const uint8_t* tiles,
                      const uint8_t* offsets, const fdb_inputs* inputs, int64_t columns,
                      int64_t first, int64_t last, float* y);

/* Integer kernels round the activations of a group to 12 or 13 bits; exact ones add in float32. */
typedef struct {
    const char* name;
    const fdb_kernel* integer;
    const fdb_kernel* exact;
    int8_rows* int8;
    attention* attention;
    gated_activation* gated_silu;
    const training_kernels* training;
    int (*supported)(void);
} fdb_instruction_set;

extern const fdb_kernel fdb_portable_exact;

extern const fdb_instruction_set fdb_avx512;
extern const fdb_instruction_set fdb_avx2;
extern const fdb_instruction_set fdb_neon;
extern const fdb_instruction_set fdb_portable;

extern const fdb_instruction_set* fdb_chosen;

#endif
