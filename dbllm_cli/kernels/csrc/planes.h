/* Dense weights from planes and scales, and gradients back, as loops that compilers make vectors
 * of.
 */
#ifndef DBLLM_PLANES_H
#define DBLLM_PLANES_H

#include <string.h>

#include "floats.h"
#include "training.h"
#include "training_lanes.h"

/* The bits of as many weights as there are lanes, from weight `i` on, which begins a byte. */
DECODE_INLINE uint32_t plane_word(const uint8_t* plane, int64_t i) {
    return plane[i / 8] | (uint32_t)plane[i / 8 + 1] << 8;
}

DECODE_INLINE int plane_bit(const uint8_t* plane, int64_t i) { return plane[i / 8] >> i % 8 & 1; }

/* Indexed by b1 + 2 b2. */
#define PLANES_CHOOSE(b1, b2, of) ((b2) ? ((b1) ? (of)[3] : (of)[2]) : ((b1) ? (of)[1] : (of)[0]))

#define PLANES_WRITE(type, of)                                                                 \
    do {                                                                                       \
        type* to = dense;                                                                      \
        int64_t i = 0;                                                                         \
        for (; i + TRAINING_LANES <= g->count; i += TRAINING_LANES) {                          \
            uint32_t word1 = plane_word(g->plane1, i), word2 = plane_word(g->plane2, i);       \
            for (int lane = 0; lane < TRAINING_LANES; lane++)                                  \
                to[i + lane] = (type)PLANES_CHOOSE(word1 >> lane & 1, word2 >> lane & 1, of);  \
        }                                                                                      \
        for (; i < g->count; i++)                                                              \
            to[i] = (type)PLANES_CHOOSE(plane_bit(g->plane1, i), plane_bit(g->plane2, i), of); \
    } while (0)

DECODE_INLINE void plane_levels_any(const training_group* g, void* dense) {
    group_scales s = g->scales;
    float levels[4] = {0, s.alpha1, s.alpha2, s.alpha1 + s.alpha2};
    uint32_t halves[4];
    for (int i = 0; i < 4; i++) {
        levels[i] += s.beta;
        halves[i] = fdb_to_bfloat16(levels[i]);
    }
    if (g->bfloat16)
        PLANES_WRITE(uint16_t, halves);
    else
        PLANES_WRITE(float, levels);
}

DECODE_INLINE group_scales plane_gradients_of(const training_group* g, const void* dense,
                                              int bfloat16) {
    float all[TRAINING_LANES] = {0}, of1[TRAINING_LANES] = {0}, of2[TRAINING_LANES] = {0};
    int64_t i = 0;
    for (; i + TRAINING_LANES <= g->count; i += TRAINING_LANES) {
        uint32_t word1 = plane_word(g->plane1, i), word2 = plane_word(g->plane2, i);
        for (int lane = 0; lane < TRAINING_LANES; lane++) {
            float gradient = fdb_float_at(dense, i + lane, bfloat16);
            all[lane] += gradient;
            of1[lane] += word1 >> lane & 1 ? gradient : 0;
            of2[lane] += word2 >> lane & 1 ? gradient : 0;
        }
    }
    for (; i < g->count; i++) {
        float gradient = fdb_float_at(dense, i, bfloat16);
        all[0] += gradient;
        of1[0] += plane_bit(g->plane1, i) ? gradient : 0;
        of2[0] += plane_bit(g->plane2, i) ? gradient : 0;
    }
    /* A group without levels stays without them. */
    int dead = g->scales.alpha1 == 0 && g->scales.alpha2 == 0;
    return (group_scales){training_total(of1), training_total(of2), dead ? 0 : training_total(all)};
}

DECODE_INLINE group_scales plane_gradients_any(const training_group* g, const void* dense) {
    return g->bfloat16 ? plane_gradients_of(g, dense, 1) : plane_gradients_of(g, dense, 0);
}

#endif
