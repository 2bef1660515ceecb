/* The functions of training.h, as loops that compilers make vectors of. */
#ifndef DBLLM_LATENTS_H
#define DBLLM_LATENTS_H

#include <math.h>
#include <string.h>

#include "floats.h"
#include "training.h"
#include "training_lanes.h"

/* Levels in ascending order, and the borders between their cells. */
typedef struct {
    float levels[4], borders[3];
} latent_cells;

DECODE_INLINE latent_cells latent_cells_of(const training_group* g) {
    float middle = g->alpha1 + g->alpha2;
    latent_cells c = {.levels = {g->alpha2, fminf(middle, 0), fmaxf(middle, 0), g->alpha1}};
    for (int i = 0; i < 4; i++) c.levels[i] += g->beta;
    for (int i = 0; i < 3; i++) c.borders[i] = (c.levels[i] + c.levels[i + 1]) / 2;
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

DECODE_INLINE void latent_add(const latent_cells* c, float below, float beyond, float w,
                              float gradient, int lane, latent_sums* sums, float* latent) {
    sums->all[lane] += gradient;
    sums->above[0][lane] += w > c->borders[0] ? gradient : 0;
    sums->above[1][lane] += w >= c->borders[1] ? gradient : 0;
    sums->above[2][lane] += w > c->borders[2] ? gradient : 0;
    *latent = (w >= below) & (w <= beyond) ? gradient : 0;
}

DECODE_INLINE scale_gradients latent_gradients_of(const training_group* g, const void* dense,
                                                  float* latent, int bfloat16) {
    latent_cells c = latent_cells_of(g);
    latent_sums sums = {0};
    float below = c.levels[0] - (c.levels[1] - c.levels[0]) / 2;
    float beyond = c.levels[3] + (c.levels[3] - c.levels[2]) / 2;
    int64_t i = 0;
    for (; i + TRAINING_LANES <= g->count; i += TRAINING_LANES)
        for (int lane = 0; lane < TRAINING_LANES; lane++)
            latent_add(&c, below, beyond, g->latent[i + lane],
                       fdb_float_at(dense, i + lane, bfloat16), lane, &sums, latent + i + lane);
    for (; i < g->count; i++)
        latent_add(&c, below, beyond, g->latent[i], fdb_float_at(dense, i, bfloat16), 0, &sums,
                   latent + i);
    float all = training_total(sums.all), above0 = training_total(sums.above[0]);
    float above1 = training_total(sums.above[1]), above2 = training_total(sums.above[2]);
    /* Cells from the lowest: b2, both or none, none or both, b1 (levels.py). */
    int upright = g->alpha1 + g->alpha2 >= 0;
    if (g->alpha1 == 0 && g->alpha2 == 0) return (scale_gradients){0};
    return (scale_gradients){
        .alpha1 = upright ? above1 : above2 + (above0 - above1),
        .alpha2 = upright ? (all - above0) + (above1 - above2) : all - above1,
        .beta = all,
    };
}

DECODE_INLINE scale_gradients latent_gradients_any(const training_group* g, const void* dense,
                                                   float* latent) {
    return g->bfloat16 ? latent_gradients_of(g, dense, latent, 1)
                       : latent_gradients_of(g, dense, latent, 0);
}

#endif
