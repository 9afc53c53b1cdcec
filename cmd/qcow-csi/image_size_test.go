package main

import (
	"math"
	"testing"
)

func TestSizes(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "512b": 512, "1k": 1024, "1K": 1024, "10M": 10 << 20, "1.5G": 3 << 29, "2T": 2 << 40, "1P": 1 << 50, "7E": 7 << 60,
		"1Gi": 1 << 30, "64KiB": 64 << 10, "0.0001": 0, "9223372036854775807": math.MaxInt64,
	} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "G", "-1", "+1", "1X", "1 G", "1e3", "1/2", "0x10", "1.", ".5", "1GG", "8E", "9223372036854775808", "1\n"} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("parseSize(%q) = %d", s, got)
		}
	}
	for n, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1023: "0.999 KiB", 1024: "1 KiB", 10 << 20: "10 MiB", 1023 << 20: "0.999 GiB", math.MaxInt64: "8 EiB",
	} {
		if got := humanSize(n); got != want {
			t.Errorf("humanSize(%d) = %q, want %q", n, got, want)
		}
	}
}
