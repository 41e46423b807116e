#include "cuda/attend_family.h"

namespace mla::cuda {

const AttendFamily kAttendFp16 = family<Fp16Format>();

}  // namespace mla::cuda
