#include "distillation.h"
#include "latents.h"
#include "training.h"

#if defined(__x86_64__)

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,fma,prefer-vector-width=512")))

TARGET void latent_levels_avx512(const latent_group* group, void* dense) {
    latent_levels_any(group, dense);
}

TARGET void latent_gradients_avx512(const latent_group* group, const void* dense, float* latent,
                                    float* alpha1, float* alpha2) {
    latent_gradients_any(group, dense, latent, alpha1, alpha2);
}

TARGET void distillation_avx512(distillation_token* token) { distillation_any(token); }

#endif
