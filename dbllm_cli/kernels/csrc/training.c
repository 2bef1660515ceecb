#include "training.h"

#include "distillation.h"
#include "latents.h"

void latent_levels_portable(const latent_group* group, void* dense) {
    latent_levels_any(group, dense);
}

void latent_gradients_portable(const latent_group* group, const void* dense, float* latent,
                               float* alpha1, float* alpha2) {
    latent_gradients_any(group, dense, latent, alpha1, alpha2);
}

void distillation_portable(distillation_token* token) { distillation_any(token); }
