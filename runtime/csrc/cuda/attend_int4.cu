#include "cuda/attend_family.h"

namespace mla::cuda {

const AttendFamily kAttendInt4 = family<Int4Format>();

}  // namespace mla::cuda
