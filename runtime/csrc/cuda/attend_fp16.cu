#include "cuda/attend_family.h"

namespace mla::cuda {

const AttendFamily kAttendFp16 = {Family<Fp16Format>::describe, Family<Fp16Format>::launch};

}  // namespace mla::cuda
