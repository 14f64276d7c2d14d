package jobspec

import (
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

// decimalPlaces is the precision of every decimal number in a job file.
const decimalPlaces = 6

// parseDecimal reads "0.036" as millionths, without going through a float.
func parseDecimal(s string) (int64, error) {
	whole, frac, dotted := strings.Cut(s, ".")
	if whole == "" || dotted && frac == "" || strings.Trim(whole+frac, "0123456789") != "" {
		return 0, fmt.Errorf("want a decimal number such as 0.05")
	}
	if len(frac) > decimalPlaces {
		return 0, fmt.Errorf("at most %d decimals", decimalPlaces)
	}
	n, err := strconv.ParseInt(whole+frac+strings.Repeat("0", decimalPlaces-len(frac)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("too large a number")
	}
	return n, nil
}

// sizeUnits are the units of sizes, the largest first.
var sizeUnits = []struct {
	name  string
	bytes uint64
}{
	{"TiB", 1 << 40}, {"TB", 1e12}, {"GiB", 1 << 30}, {"GB", 1e9},
	{"MiB", 1 << 20}, {"MB", 1e6}, {"KiB", 1 << 10}, {"kB", 1e3}, {"B", 1},
}

// ParseSize reads a size: "24GB", "1.5GiB" or a whole number of bytes.
func ParseSize(s string) (int64, error) {
	end := strings.LastIndexAny(s, "0123456789.") + 1
	number, unit := s[:end], strings.TrimSpace(s[end:])
	factor := uint64(1)
	if unit != "" {
		factor = 0
		for _, u := range sizeUnits {
			if strings.EqualFold(u.name, unit) {
				factor = u.bytes
			}
		}
	}
	millionths, err := parseDecimal(number)
	switch {
	case factor == 0 || err != nil || unit == "" && strings.Contains(number, "."):
		return 0, fmt.Errorf("want a size such as 24GB (10^9 bytes each), 24GiB (2^30 bytes each) or a whole number of bytes")
	}
	hi, lo := bits.Mul64(uint64(millionths), factor)
	if hi >= 1e6 {
		return 0, fmt.Errorf("too large a size")
	}
	n, _ := bits.Div64(hi, lo, 1e6)
	if n > math.MaxInt64 {
		return 0, fmt.Errorf("too large a size")
	}
	return int64(n), nil
}

// FormatSize writes a size in the largest unit that divides it, as ParseSize
// reads it.
func FormatSize(n int64) string {
	for _, u := range sizeUnits {
		if n != 0 && uint64(n)%u.bytes == 0 {
			return strconv.FormatUint(uint64(n)/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}
