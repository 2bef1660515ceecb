/* Random numbers, and random layers as files hold them; for csrc_test.c. */
#ifndef CSRC_RANDOM_H
#define CSRC_RANDOM_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fdb.h"

int64_t dbllm_tiles_bytes(int64_t in_features, int64_t out_features, int64_t group_size);
void dbllm_tile(int64_t in_features, int64_t out_features, int64_t group_size, uint8_t *planes,
                uint16_t *scales, uint8_t *tiles, int to_tiles);

enum { GARBAGE = 0xFF };

static const int64_t INPUTS[] = {1,  7,   8,   31,  32,  33,  63,  64,  65,
                                 96, 100, 128, 129, 172, 257, 520, 1100};
static const int64_t OUTPUTS[] = {1, 15, 16, 17, 33, 48, 63, 64, 65, 100, 128, 130, 200};
static const int64_t GROUPS[] = {32, 64, 96, 128, 160, 256, 512, 1024};

#define FAIL(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1))
#define PICK(list) (list)[below(sizeof(list) / sizeof *(list))]

/* -- random numbers ---------------------------------------------------------------------------- */

static uint64_t state;

static uint64_t draw(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}
static uint64_t below(uint64_t limit) { return (draw() >> 20) % limit; }
/* From -1 to 1. */
static double uniform(void) { return (double)below(1 << 20) / (1 << 19) - 1; }

static void *memory(int64_t bytes) {
    void *pointer = malloc((size_t)bytes);
    if (pointer == NULL) FAIL("no memory");
    return memset(pointer, GARBAGE, (size_t)bytes);
}

/* Tables are as large as fdb.h says and begin at a multiple of 64 bytes. */
static uint8_t *table_memory(int64_t bytes) {
    void *pointer = aligned_alloc(64, (size_t)bytes);
    if (pointer == NULL) FAIL("no memory for tables");
    return memset(pointer, GARBAGE, (size_t)bytes);
}

/* -- one layer, as files hold it --------------------------------------------------------------- */

typedef struct {
    fdb_shape shape;
    int64_t row_bytes, groups, plane_bytes, scale_count, tile_bytes;
    uint8_t *planes, *tiles;
    uint16_t *scales, *offsets; /* or NULL */
} layer;

static layer random_layer(void) {
    layer l = {.shape = {PICK(INPUTS), PICK(OUTPUTS), PICK(GROUPS)}};
    const fdb_shape *s = &l.shape;
    l.row_bytes = (s->in_features + 7) / 8;
    l.groups = (s->in_features + s->group_size - 1) / s->group_size;
    l.plane_bytes = 2 * s->out_features * l.row_bytes;
    l.scale_count = 2 * s->out_features * l.groups;
    l.tile_bytes = dbllm_tiles_bytes(s->in_features, s->out_features, s->group_size);
    l.planes = memory(l.plane_bytes);
    l.scales = memory(l.scale_count * 2);
    l.tiles = memory(l.tile_bytes);
    for (int64_t i = 0; i < l.plane_bytes; i++) l.planes[i] = (uint8_t)below(256);
    /* Both signs, from denormal numbers to 4. */
    for (int64_t i = 0; i < l.scale_count; i++)
        l.scales[i] = (uint16_t)(below(2) << 15 | below(0x4400));
    memset(l.tiles, 0, (size_t)l.tile_bytes);
    dbllm_tile(s->in_features, s->out_features, s->group_size, l.planes, l.scales, l.tiles, 1);
    if (below(2)) {
        int64_t count = fdb_blocks(s) * l.groups * FDB_BLOCK_ROWS;
        l.offsets = memory(count * 2);
        for (int64_t i = 0; i < count; i++)
            l.offsets[i] = (uint16_t)(below(2) << 15 | below(0x4400));
    }
    return l;
}

static void free_layer(layer *l) {
    free(l->planes), free(l->scales), free(l->tiles), free(l->offsets);
}

static double value_of(uint16_t half) {
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    double size = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return half & 0x8000 ? -size : size;
}

static double scale_of(const layer *l, int plane, int64_t row, int64_t group) {
    return value_of(l->scales[(plane * l->shape.out_features + row) * l->groups + group]);
}

static double offset_of(const layer *l, int64_t row, int64_t group) {
    if (l->offsets == NULL) return 0;
    int64_t block = row / FDB_BLOCK_ROWS, place = row % FDB_BLOCK_ROWS;
    return value_of(l->offsets[(block * l->groups + group) * FDB_BLOCK_ROWS + place]);
}

static int bit_of(const layer *l, int plane, int64_t row, int64_t input) {
    const uint8_t *bits = l->planes + (plane * l->shape.out_features + row) * l->row_bytes;
    return bits[input / 8] >> input % 8 & 1;
}

static void check_layout(const layer *l) {
    const fdb_shape *s = &l->shape;
    uint8_t *planes = memory(l->plane_bytes);
    uint16_t *scales = memory(l->scale_count * 2);
    dbllm_tile(s->in_features, s->out_features, s->group_size, planes, scales, l->tiles, 0);
    if (memcmp(planes, l->planes, (size_t)l->plane_bytes) ||
        memcmp(scales, l->scales, (size_t)l->scale_count * 2))
        FAIL("layout: %ld x %ld, groups of %ld", (long)s->out_features, (long)s->in_features,
             (long)s->group_size);
    free(planes), free(scales);
}

#endif
