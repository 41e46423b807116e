#include "core/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/error.h"

namespace mla::core {

namespace {

Error failed(const char* what, const std::string& path, int number) {
    return Error(MLA_FILE_ERROR, join(path, " cannot be ", what)).found(std::strerror(number));
}

}  // namespace

InputFile::InputFile(const std::string& path)
    : path_(path), descriptor_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (descriptor_ < 0) throw failed("read", path, errno);
    struct stat status{};
    const int result = fstat(descriptor_, &status);
    if (result != 0 || !S_ISREG(status.st_mode)) {
        const int number = result != 0 ? errno : S_ISDIR(status.st_mode) ? EISDIR : EINVAL;
        close(descriptor_);
        throw failed("read", path, number);
    }
    size_ = static_cast<uint64_t>(status.st_size);
}

InputFile::~InputFile() { close(descriptor_); }

void InputFile::read(void* data, size_t size) {
    auto* bytes = static_cast<uint8_t*>(data);
    while (size > 0) {
        const ssize_t count = ::read(descriptor_, bytes, size);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw failed("read", path_, errno);
        if (count == 0) {
            throw Error(MLA_FILE_ERROR, join(path_, " ended early")).next("copy it again");
        }
        bytes += count;
        size -= static_cast<size_t>(count);
    }
}

OutputFile::OutputFile(const std::string& path) : path_(path), temporary_(path + ".XXXXXX") {
    descriptor_ = mkostemp(temporary_.data(), O_CLOEXEC);  // readable by its owner alone
    if (descriptor_ < 0) throw failed("written", path, errno);
}

OutputFile::~OutputFile() {
    if (descriptor_ < 0) return;
    close(descriptor_);
    unlink(temporary_.c_str());
}

void OutputFile::write(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    while (size > 0) {
        const ssize_t count = ::write(descriptor_, bytes, size);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) throw failed("written", path_, errno);
        bytes += count;
        size -= static_cast<size_t>(count);
    }
}

void OutputFile::commit() {
    if (fsync(descriptor_) != 0) throw failed("written", path_, errno);
    if (rename(temporary_.c_str(), path_.c_str()) != 0) throw failed("written", path_, errno);
    close(descriptor_);
    descriptor_ = -1;
}

Sha256::Digest sha256_of(const std::string& path) {
    InputFile file(path);
    Sha256 hash;
    std::vector<uint8_t> buffer(1 << 20);
    for (uint64_t left = file.size(); left > 0;) {
        const size_t count = static_cast<size_t>(std::min<uint64_t>(left, buffer.size()));
        file.read(buffer.data(), count);
        hash.update(buffer.data(), count);
        left -= count;
    }
    return hash.finish();
}

}  // namespace mla::core
