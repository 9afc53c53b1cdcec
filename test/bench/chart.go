package main

import (
	"encoding/xml"
	"fmt"
	"math"
	"strings"
)

// Measures of the picture, in pixels.
const (
	chartWidth = 860
	chartLeft  = 220 // where the bars begin
	chartRight = 60  // for the figures after the longest ones
	chartTop   = 92
	barPitch   = 18
	barHeight  = 12
)

// chartStyle works on light and dark pages.
const chartStyle = `text{font:12px system-ui,sans-serif;fill:#1f2328}.title{font-size:15px;font-weight:600}.quiet{fill:#59636e}` +
	`.dot{stroke:#fff;stroke-width:1.5}.end{text-anchor:end}.middle{text-anchor:middle}.met{fill:#2f81f7}.missed{fill:#d4762c}.grid{stroke:#d1d9e0}` +
	`.one{stroke:#59636e}.target{stroke:#1f2328;stroke-width:2}` +
	`@media(prefers-color-scheme:dark){.dot{stroke:#0d1117}text{fill:#e6edf3}.quiet{fill:#9198a1}.grid{stroke:#3d444d}.one{stroke:#9198a1}.target{stroke:#e6edf3}}`

// bar is one line of the picture: what one workload, depth and number of connections come to.
type bar struct {
	label string
	load  comparison // with our own generator, or with nbdcopy
	fio   comparison
}

// bars returns the lines of the picture.
func (r *report) bars() (bs []bar) {
	for _, row := range r.Rows {
		c := r.againstQEMU(row)
		if !c.judged() {
			continue
		}
		label := row.Workload.Name + ", " + row.shape()
		if row.Workload.isCopy() {
			label = row.Workload.Name
		}
		if len(bs) == 0 || bs[len(bs)-1].label != label {
			bs = append(bs, bar{label: label})
		}
		b := &bs[len(bs)-1]
		if row.Client == "fio" {
			b.fio = c
		} else {
			b.load = c
		}
	}
	return bs
}

// chart draws the ratios to QEMU on a logarithmic axis, with their targets. It depends on nothing but the report.
func (r *report) chart() string {
	bs := r.bars()
	least, most := 1.0, 2.0
	for _, b := range bs {
		for _, c := range []comparison{b.load, b.fio} {
			if c.judged() {
				least, most = min(least, c.ratio), max(most, c.ratio, c.target)
			}
		}
	}
	low, high := math.Floor(math.Log2(least)), math.Ceil(math.Log2(most))
	x := func(ratio float64) float64 {
		return chartLeft + (math.Log2(ratio)-low)/(high-low)*(chartWidth-chartLeft-chartRight)
	}
	bottom := chartTop + barPitch*len(bs)

	var p strings.Builder
	draw := func(format string, args ...any) { fmt.Fprintf(&p, format+"\n", args...) }
	draw(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img">`, chartWidth, bottom+16, chartWidth, bottom+16)
	draw("<title>qcow-csi compared with QEMU</title>\n<style>%s</style>", chartStyle)
	draw(`<text class="title" x="8" y="22">qcow-csi: how many times as fast as the better of qemu-nbd and qemu-storage-daemon</text>`)
	draw(`<text class="quiet" x="8" y="41">%s, %s, %d CPUs, %d rounds of %g s. The numbers after a workload are depth x connections.</text>`,
		escape(r.Date), escape(r.Machine.Processor), r.Machine.CPUs, r.Rounds, r.Runtime)
	draw(`<text class="quiet" x="8" y="58">Bars: our load generator, and nbdcopy. Dots: fio. Marks: the targets. Blue reaches its target, orange does not.</text>`)
	for e := low; e <= high; e++ {
		class := "grid"
		if e == 0 {
			class = "one"
		}
		draw(`<line class="%s" x1="%.1f" y1="%d" x2="%.1f" y2="%d"/>`, class, x(math.Exp2(e)), chartTop-4, x(math.Exp2(e)), bottom)
		draw(`<text class="quiet middle" x="%.1f" y="%d">%g</text>`, x(math.Exp2(e)), chartTop-9, math.Exp2(e))
	}
	for i, b := range bs {
		top := chartTop + barPitch*i
		draw(`<text class="end" x="%d" y="%d">%s</text>`, chartLeft-8, top+barHeight-1, escape(b.label))
		target, right := max(b.load.target, b.fio.target), x(1)
		if b.load.judged() {
			from, to := min(x(1), x(b.load.ratio)), max(x(1), x(b.load.ratio))
			draw(`<rect class="%s" x="%.1f" y="%d" width="%.1f" height="%d"/>`, b.load.class(), from, top, to-from, barHeight)
			right = max(right, to)
		}
		draw(`<line class="target" x1="%.1f" y1="%d" x2="%.1f" y2="%d"/>`, x(target), top-2, x(target), top+barHeight+2)
		if b.fio.judged() {
			draw(`<circle class="dot %s" cx="%.1f" cy="%d" r="5"/>`, b.fio.class(), x(b.fio.ratio), top+barHeight/2)
			right = max(right, x(b.fio.ratio))
		}
		if b.load.judged() {
			draw(`<text x="%.1f" y="%d">%.2f</text>`, max(right, x(target))+8, top+barHeight-1, b.load.ratio)
		}
	}
	return p.String() + "</svg>\n"
}

// class is the colour of what shows the comparison.
func (c comparison) class() string {
	if c.met() {
		return "met"
	}
	return "missed"
}

func escape(s string) string {
	var b strings.Builder
	if err := xml.EscapeText(&b, []byte(s)); err != nil {
		return ""
	}
	return b.String()
}
