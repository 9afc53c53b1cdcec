package main

import "slices"

// median returns the middle of the values; 0 if there are none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}

// ratio returns the median of the quotients of what was measured in the same round: what disturbs a whole round disturbs
// both sides.
func ratio(over, under []float64) float64 {
	var quotients []float64
	for i := range min(len(over), len(under)) {
		if under[i] != 0 {
			quotients = append(quotients, over[i]/under[i])
		}
	}
	return median(quotients)
}

// pick returns one figure of all samples.
func pick(samples []sample, of func(sample) float64) []float64 {
	values := make([]float64, len(samples))
	for i, s := range samples {
		values[i] = of(s)
	}
	return values
}

func value(s sample) float64 { return s.Value }
func cpu(s sample) float64   { return s.CPU }
