#include "torch_check.h"

#include <stdlib.h>

#include "fdb.h"

_Noreturn void refuse(stable_value* stack, int tensors, const char* message) {
    for (int i = 0; i < tensors; i++) torch.delete_tensor((tensor)stack[i]);
    torch.throw_error(message);
    abort(); /* it never comes back */
}

int has_sizes(const array* x, element_type type, int64_t dim, const int64_t* sizes) {
    int64_t stride = 1;
    if (x->type != type || x->dim != dim) return 0;
    for (int64_t d = dim - 1; d >= 0; d--) {
        if (x->sizes[d] != sizes[d] || (sizes[d] > 1 && x->strides[d] != stride)) return 0;
        stride *= sizes[d];
    }
    return 1;
}

int is_vector(const array* x, int64_t count, int optional) {
    if (optional && x->dim == 1 && x->sizes[0] == 0) return 1;
    return is_floating(x) && x->dim == 1 && x->sizes[0] == count;
}

int is_tiles(const array* x, int64_t in_features, int64_t out_features, int64_t group_size) {
    if (in_features <= 0 || out_features <= 0 || group_size <= 0) return 0;
    if (group_size % FDB_WORD_INPUTS != 0) return 0;
    fdb_shape shape = {in_features, out_features, group_size};
    int64_t start = fdb_offsets_start(&shape);
    int64_t offsets = fdb_blocks(&shape) * FDB_BLOCK_ROWS * fdb_groups(&shape) * 2;
    return has_sizes(x, UINT8, 1, &start) ||
           has_sizes(x, UINT8, 1, (int64_t[]){start + offsets});
}
