// The kernels for any machine.
#include "api.h"
#include "fp8_table.h"
#include "integer_table.h"

#define ISO_ATTR
#define ISO_NAME generic
#define ISO_LABEL "generic"
#define ISO_W 4
#define ISO_SIMD "simd_generic.h"
#include "kernels.inc"

namespace iso {
const Ops* generic_ops() { return generic::ops(); }
}  // namespace iso
