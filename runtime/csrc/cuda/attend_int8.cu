#include "cuda/attend_family.h"

namespace mla::cuda {

const AttendFamily kAttendInt8 = family<Int8Format>();

}  // namespace mla::cuda
