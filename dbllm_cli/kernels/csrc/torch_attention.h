/* Attention of one query a sequence, on torch's threads. */
#ifndef DBLLM_TORCH_ATTENTION_H
#define DBLLM_TORCH_ATTENTION_H

#include "torch_abi.h"

/* Whether an operator's arguments query, key, value and mask are what attention_run reads. */
int attention_fits(const stable_value* arguments, const array* query);

/* Attends from the operator's arguments query, key, value and mask.
 *
 * `query`: the first of them, [batch][heads][1][dim].
 * `scaled`: room for its numbers times `scale`.
 * `out`: [batch][heads][dim].
 */
void attention_run(const stable_value* arguments, const array* query, float scale, float* scaled,
                   float* out);

#endif
