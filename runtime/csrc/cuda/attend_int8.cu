#include "cuda/attend_family.h"

namespace mla::cuda {

const AttendFamily kAttendInt8 = {Family<Int8Format>::describe, Family<Int8Format>::launch};

}  // namespace mla::cuda
