// Files: read without surprises, written whole or not at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "core/sha256.h"

namespace mla::core {

// A regular file that is read from its start. Errors: MLA_FILE_ERROR.
class InputFile {
  public:
    explicit InputFile(const std::string& path);
    ~InputFile();
    InputFile(const InputFile&) = delete;
    InputFile& operator=(const InputFile&) = delete;

    uint64_t size() const { return size_; }

    // The next `size` bytes; that the file ends before is an error.
    void read(void* data, size_t size);

  private:
    std::string path_;
    int descriptor_;
    uint64_t size_;
};

// A file under a temporary name beside `path`, removed unless `commit` is reached.
// Errors: MLA_FILE_ERROR.
class OutputFile {
  public:
    explicit OutputFile(const std::string& path);
    ~OutputFile();
    OutputFile(const OutputFile&) = delete;
    OutputFile& operator=(const OutputFile&) = delete;

    void write(const void* data, size_t size);

    // Everything is on the disk, and the file has its name.
    void commit();

  private:
    std::string path_;
    std::string temporary_;
    int descriptor_;
};

Sha256::Digest sha256_of(const std::string& path);

}  // namespace mla::core
