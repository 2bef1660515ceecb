/* The functions of training.h, as loops that compilers make vectors of. */
#ifndef DBLLM_LATENTS_H
#define DBLLM_LATENTS_H

#include <math.h>
#include <string.h>

#include "floats.h"
#include "training.h"
#include "training_lanes.h"

/* From the lowest cell: their levels, the borders between them, and how far the gradient passes. */
typedef struct {
    float levels[4], borders[3], below, beyond;
} latent_cells;

/* Cells from the lowest: b2, both or none, none or both, b1 (levels.py). */
DECODE_INLINE int latent_upright(const training_group* g) {
    return g->cells.alpha1 + g->cells.alpha2 >= 0;
}

DECODE_INLINE void latent_sorted(const group_scales* s, int upright, float levels[4]) {
    float both = s->alpha1 + s->alpha2;
    levels[0] = s->alpha2 + s->beta;
    levels[1] = (upright ? 0 : both) + s->beta;
    levels[2] = (upright ? both : 0) + s->beta;
    levels[3] = s->alpha1 + s->beta;
}

DECODE_INLINE latent_cells latent_cells_of(const training_group* g) {
    latent_cells c;
    float own[4];
    latent_sorted(&g->scales, latent_upright(g), c.levels);
    latent_sorted(&g->cells, latent_upright(g), own);
    for (int i = 0; i < 3; i++) c.borders[i] = (own[i] + own[i + 1]) / 2;
    c.below = own[0] - (own[1] - own[0]) / 2;
    c.beyond = own[3] + (own[3] - own[2]) / 2;
    return c;
}

/* Where all three borders coincide the middle one rules, as in levels.py. */
#define LATENTS_CHOOSE(w, borders, of)                              \
    ((w) >= (borders)[1] ? ((w) > (borders)[2] ? (of)[3] : (of)[2]) \
                         : ((w) > (borders)[0] ? (of)[1] : (of)[0]))

DECODE_INLINE void latent_levels_any(const training_group* g, void* dense) {
    latent_cells c = latent_cells_of(g);
    if (!g->bfloat16) {
        float* to = dense;
        for (int64_t i = 0; i < g->count; i++)
            to[i] = LATENTS_CHOOSE(g->latent[i], c.borders, c.levels);
        return;
    }
    uint16_t* to = dense;
    uint32_t halves[4];
    for (int i = 0; i < 4; i++) halves[i] = fdb_to_bfloat16(c.levels[i]);
    for (int64_t i = 0; i < g->count; i++)
        to[i] = (uint16_t)LATENTS_CHOOSE(g->latent[i], c.borders, halves);
}

/* Sums of the gradients in all cells, and above each border, in lanes. */
typedef struct {
    float all[TRAINING_LANES], above[3][TRAINING_LANES];
} latent_sums;

DECODE_INLINE void latent_add(const latent_cells* c, float w, float gradient, int lane,
                              latent_sums* sums, float* latent) {
    sums->all[lane] += gradient;
    sums->above[0][lane] += w > c->borders[0] ? gradient : 0;
    sums->above[1][lane] += w >= c->borders[1] ? gradient : 0;
    sums->above[2][lane] += w > c->borders[2] ? gradient : 0;
    *latent = (w >= c->below) & (w <= c->beyond) ? gradient : 0;
}

DECODE_INLINE group_scales latent_gradients_of(const training_group* g, const void* dense,
                                               float* latent, int bfloat16) {
    latent_cells c = latent_cells_of(g);
    latent_sums sums = {0};
    int64_t i = 0;
    for (; i + TRAINING_LANES <= g->count; i += TRAINING_LANES)
        for (int lane = 0; lane < TRAINING_LANES; lane++)
            latent_add(&c, g->latent[i + lane], fdb_float_at(dense, i + lane, bfloat16), lane,
                       &sums, latent + i + lane);
    for (; i < g->count; i++)
        latent_add(&c, g->latent[i], fdb_float_at(dense, i, bfloat16), 0, &sums, latent + i);
    float all = training_total(sums.all), above0 = training_total(sums.above[0]);
    float above1 = training_total(sums.above[1]), above2 = training_total(sums.above[2]);
    int upright = latent_upright(g);
    /* A group without levels stays without them. */
    if (g->scales.alpha1 == 0 && g->scales.alpha2 == 0) return (group_scales){0};
    return (group_scales){
        .alpha1 = upright ? above1 : above2 + (above0 - above1),
        .alpha2 = upright ? (all - above0) + (above1 - above2) : all - above1,
        .beta = all,
    };
}

DECODE_INLINE group_scales latent_gradients_any(const training_group* g, const void* dense,
                                                float* latent) {
    return g->bfloat16 ? latent_gradients_of(g, dense, latent, 1)
                       : latent_gradients_of(g, dense, latent, 0);
}

#endif
