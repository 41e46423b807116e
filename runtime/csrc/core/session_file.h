// Sessions in files.
//
//     bytes                 what
//     8                     "mla-sess"
//     4                     version, 1
//     4                     tokens a page, 64
//     32                    the model: Bundle::fingerprint
//     8                     bytes of a page in all layers
//     8                     n, number of tokens
//     4 n                   the tokens
//     ceil(n/64) pages      page after page, each with its arrays in the manifest's order
//     32                    sha256 of all that comes before
//
// Integers are little-endian. Pages are as the graph wrote them: the record of the cache, whole,
// with what its last page holds beyond token n.
#pragma once

#include <memory>
#include <string>

#include "core/session.h"

namespace mla::core {

// Errors: MLA_FILE_ERROR, MLA_BUSY.
void save_session(Session& session, const std::string& path);

// Errors: MLA_FILE_ERROR, MLA_BAD_SESSION_FILE, MLA_CONTEXT_FULL, MLA_CACHE_FULL.
std::shared_ptr<Session> load_session(Engine& engine, const std::string& path);

}  // namespace mla::core
