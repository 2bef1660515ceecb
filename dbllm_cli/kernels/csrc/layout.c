/* Between the files' layout, planes uint8 [2][out][ceil(in / 8)] and scales float16
 * [2][out][groups], and the tiles of fdb.h. */
#include <string.h>

#include "fdb.h"

typedef struct {
    fdb_shape shape;
    int64_t row_bytes; /* of a plane in a file */
    uint8_t* planes;
    uint16_t* scales;
    int to_tiles;
} transfer;

static void copy(const transfer* t, void* in_file, void* in_tile, size_t bytes) {
    if (t->to_tiles)
        memcpy(in_tile, in_file, bytes);
    else
        memcpy(in_file, in_tile, bytes);
}

/* One row of one tile of a group. */
static void copy_row(const transfer* t, int64_t group, int64_t row, uint8_t* tile) {
    int64_t words = fdb_group_words(&t->shape, group), first = fdb_words_before(&t->shape, group);
    int64_t out = t->shape.out_features, groups = fdb_groups(&t->shape), lane = row % FDB_TILE_ROWS;
    uint8_t* scales = tile + words * 2 * FDB_PLANE_BYTES;
    for (int64_t plane = 0; plane < 2; plane++) {
        uint8_t* bits = t->planes + (plane * out + row) * t->row_bytes;
        for (int64_t word = 0; word < words; word++) {
            int64_t even = word & ~(int64_t)1, pair = fdb_min(2, words - even);
            int64_t line = even * 2 + plane * pair + (word & 1), at = (first + word) * 4;
            copy(t, bits + at, tile + line * FDB_PLANE_BYTES + lane * 4,
                 (size_t)fdb_min(4, t->row_bytes - at));
        }
        copy(t, t->scales + (plane * out + row) * groups + group,
             scales + plane * FDB_SCALE_BYTES / 2 + lane * 2, 2);
    }
}

/* Which layout of tiles this library reads: one that was not compiled anew must not be used. */
EXPORT int dbllm_layout(void) { return FDB_LAYOUT; }

/* Without offsets. */
EXPORT int64_t dbllm_tiles_bytes(int64_t in_features, int64_t out_features, int64_t group_size) {
    fdb_shape shape = {in_features, out_features, group_size};
    return fdb_offsets_start(&shape);
}

/* Copies a layer to its tiles, or back. Tiles must be zero before they are written. */
EXPORT void dbllm_tile(int64_t in_features, int64_t out_features, int64_t group_size,
                       uint8_t* planes, uint16_t* scales, uint8_t* tiles, int to_tiles) {
    transfer t = {{in_features, out_features, group_size},
                  fdb_ceil_div(in_features, 8),
                  planes,
                  scales,
                  to_tiles};
    int64_t groups = fdb_groups(&t.shape), stretch = fdb_stretch_groups(&t.shape);
    uint8_t* tile = tiles;
    for (int64_t from = 0; from < groups; from += stretch)
        for (int64_t block = 0; block < fdb_blocks(&t.shape); block++)
            for (int64_t group = from; group < fdb_min(groups, from + stretch); group++)
                for (int64_t i = 0; i < fdb_block_tiles(&t.shape, block); i++) {
                    int64_t row = block * FDB_BLOCK_ROWS + i * FDB_TILE_ROWS;
                    int64_t last = fdb_min(row + FDB_TILE_ROWS, out_features);
                    for (; row < last; row++) copy_row(&t, group, row, tile);
                    tile += fdb_tile_bytes(&t.shape, group, group + 1);
                }
}
