// The special tokens around a text: the field "post_processor".
#pragma once

#include <cstdint>
#include <vector>

#include "text/config.h"

namespace mla::text {

struct PostProcessor {
    std::vector<uint32_t> before, after;
};

PostProcessor read_post_processor(const Config& config);

}  // namespace mla::text
