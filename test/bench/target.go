package main

import (
	"fmt"
	"strings"
)

// comparison is what one column of ratios says of a row.
type comparison struct {
	peer   string  // name of the server that is compared with; "" if there is none
	ratio  float64 // ours to the peer's
	target float64 // 0: none
	atMost bool    // less is better
}

// judged tells whether there are a ratio and a target for it.
func (c comparison) judged() bool { return c.peer != "" && c.ratio != 0 && c.target != 0 }

// met tells whether the target is reached.
func (c comparison) met() bool {
	if c.atMost {
		return c.ratio <= c.target
	}
	return c.ratio >= c.target
}

// String says the ratio, the target and whether it is met.
func (c comparison) String() string {
	switch {
	case c.peer == "" || c.ratio == 0:
		return "-"
	case c.target == 0:
		return fmt.Sprintf("%.2f", c.ratio)
	}
	sign, missed := ">=", 1-c.ratio/c.target
	if c.atMost {
		sign, missed = "<=", c.ratio/c.target-1
	}
	verdict := "met"
	if !c.met() {
		verdict = fmt.Sprintf("missed by %.0f %%", max(1, 100*missed))
	}
	return fmt.Sprintf("%.2f (%s %g: %s)", c.ratio, sign, c.target, verdict)
}

// compare compares the first server that is ours with the best of a family, by a figure of which more is better or, atMost,
// less.
func (r *report) compare(row row, with family, of func(sample) float64, atMost bool) comparison {
	var mine []float64
	var peers []int
	for i, s := range r.Servers {
		switch {
		case len(row.Cells[i].Samples) == 0:
		case s.Family == ours && mine == nil:
			mine = pick(row.Cells[i].Samples, of)
		case s.Family == with:
			peers = append(peers, i)
		}
	}
	c := comparison{atMost: atMost}
	var best float64
	for _, i := range peers {
		theirs := pick(row.Cells[i].Samples, of)
		if m := median(theirs); m > 0 && mine != nil && (c.peer == "" || m > best != atMost) {
			c.peer, c.ratio, best = r.Servers[i].Name, ratio(mine, theirs), m
		}
	}
	return c
}

// againstQEMU compares with the best of QEMU's servers.
func (r *report) againstQEMU(row row) comparison {
	c := r.compare(row, qemu, value, false)
	switch {
	case row.Workload.isCopy():
		c.target = 1.3
	case row.Workload.Image == empty:
		c.target = 6
	case row.Workload.Image == onBacking:
		c.target = 3
	case strings.HasPrefix(row.Workload.Name, "sequential"):
		c.target = 1.5
	case row.Connections >= 4:
		c.target = 3.5
	case row.Depth >= 16:
		c.target = 2.5
	default:
		c.target = 1.8
	}
	return c
}

// processorAgainstQEMU compares the processor time that an I/O takes.
func (r *report) processorAgainstQEMU(row row) comparison {
	c := r.compare(row, qemu, cpu, true)
	c.target = .5
	return c
}

// againstFile compares with nbdkit and a raw file.
func (r *report) againstFile(row row) comparison {
	c := r.compare(row, nbdkitFile, value, false)
	c.target = 1.1
	if row.Workload.Image == empty {
		c.target = .9
	}
	return c
}

// againstNull compares with nbdkit and no file.
func (r *report) againstNull(row row) comparison {
	c := r.compare(row, nbdkitNull, value, false)
	c.target = .8
	return c
}

// againstRaw compares with no server.
func (r *report) againstRaw(row row) comparison { return r.compare(row, limit, value, false) }
