package main

import (
	"fmt"
	"math/big"
	"regexp"
	"strconv"
)

var sizePattern = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?)([bBkKmMgGtTpPeE]?)(?:i|iB|)$`)

// parseSize parses a size in bytes: a number, also with a fraction, and a suffix. K, M, G, T, P and E are powers of 1024, and
// may be written Ki or KiB. What is left of a byte is dropped.
func parseSize(s string) (int64, error) {
	m := sizePattern.FindStringSubmatch(s)
	if m == nil {
		return 0, fmt.Errorf("size %q is not a number with an optional suffix K, M, G, T, P or E", s)
	}
	n, ok := new(big.Rat).SetString(m[1])
	if !ok {
		return 0, fmt.Errorf("size %q is not a number", s)
	}
	shift := map[string]uint{"": 0, "b": 0, "B": 0, "k": 10, "K": 10, "m": 20, "M": 20, "g": 30, "G": 30, "t": 40, "T": 40, "p": 50, "P": 50, "e": 60, "E": 60}
	n.Mul(n, new(big.Rat).SetInt64(1<<shift[m[2]]))
	whole := new(big.Int).Quo(n.Num(), n.Denom())
	if !whole.IsInt64() {
		return 0, fmt.Errorf("size %q is too large", s)
	}
	return whole.Int64(), nil
}

// humanSize writes n with three digits and the unit that fits.
func humanSize(n int64) string {
	v, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	for v >= 999.5 && len(units) > 1 {
		v, units = v/1024, units[1:]
	}
	return strconv.FormatFloat(v, 'g', 3, 64) + " " + units[0]
}

// sizeValue is a size as a flag.
type sizeValue int64

func (v *sizeValue) String() string { return strconv.FormatInt(int64(*v), 10) }
func (v *sizeValue) Type() string   { return "size" }

// Set implements pflag.Value.
func (v *sizeValue) Set(s string) error {
	n, err := parseSize(s)
	*v = sizeValue(n)
	return err
}
