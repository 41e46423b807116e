#include "cuda/attend_family.h"

namespace mla::cuda {

const AttendFamily kAttendInt4 = {Family<Int4Format>::describe, Family<Int4Format>::launch};

}  // namespace mla::cuda
