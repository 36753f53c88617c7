// Stores past the cache: a finished tile goes from L1 to memory without first reading the lines it replaces. Included
// like tile-inl.hpp. On other architectures these are ordinary copies.

// `out` starts on a cache line, or the tile is short.
inline void stream_out(void* out, const void* tile, std::size_t bytes) {
  unsigned char* to = static_cast<unsigned char*>(out);
  const unsigned char* from = static_cast<const unsigned char*>(tile);
#if PARAMDELTA_X86
  if (reinterpret_cast<std::uintptr_t>(to) % 64 == 0) {
    for (; bytes >= 64; bytes -= 64, to += 64, from += 64) {
#if PARAMDELTA_TARGET == PARAMDELTA_AVX512
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#else
      for (int part = 0; part < 64; part += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + part),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
#endif
    }
  }
#endif
  std::memcpy(to, from, bytes);
}

// Makes the streamed stores visible before anything that follows, such as the end of the thread.
inline void end_stream() {
#if PARAMDELTA_X86
  _mm_sfence();
#endif
}
