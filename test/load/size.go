package main

import (
	"fmt"
	"strconv"
	"strings"
)

// sizeFlag is a flag for a number of bytes, such as 4096, 4k, 1M or 2g; the letters stand for powers of 1024.
type sizeFlag struct {
	bytes  *int64
	preset string
}

// String implements flag.Value. The flag package calls it on the zero value, too.
func (f sizeFlag) String() string { return f.preset }

// Set implements flag.Value.
func (f sizeFlag) Set(s string) error {
	digits, shift := s, 0
	if s != "" {
		if at := strings.IndexByte("kmgt", s[len(s)-1]|0x20); at >= 0 {
			digits, shift = s[:len(s)-1], 10*(at+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n<<shift>>shift != n {
		return fmt.Errorf("%q is no number of bytes", s)
	}
	*f.bytes = n << shift
	return nil
}
