// A bundle that was opened and checked, as mla_deploy.bundle.Bundle is.
#pragma once

#include <string>

#include "core/manifest.h"
#include "core/sha256.h"

namespace mla::core {

struct Bundle {
    std::string folder;
    Manifest manifest;

    // verify: hash files above 64 MiB too; otherwise only their sizes are compared.
    // Errors: MLA_BAD_BUNDLE.
    static Bundle open(const std::string& folder, bool verify);

    std::string graph_path() const { return folder + "/" + manifest.graph_path; }

    // Bytes of one page in all layers.
    size_t page_bytes() const;

    // Of all files and the cache's layout: bundles that share it compute the same.
    Sha256::Digest fingerprint() const;
};

}  // namespace mla::core
