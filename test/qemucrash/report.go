package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/qcow-csi/qcow-csi/test/qemucrash/judge"
)

// report is everything that one run says.
type report struct {
	QEMU    string          `json:"qemu"`
	Seed    uint64          `json:"seed"`
	States  int             `json:"states"` // asked for
	Results []*judge.Result `json:"results"`
}

func (r *report) writeJSON(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

func (r *report) writeTable(w io.Writer) error {
	_, err := fmt.Fprintf(w, `%s; seed %d, at most %d states of each
clean, leaks, corrupt, unusable: what qemu-img check says (exit status 0, 3, 2, other)
wrong: the disk or a snapshot is not what it may be; later: not until the guest has written again
in brackets: how many different contents these states have

`, r.QEMU, r.Seed, r.States)
	if err != nil {
		return err
	}
	text := []byte("operation\tshape\tsyncs\tpossible\tstates\tclean\tleaks\tcorrupt\tunusable\twrong\tlater\t\n")
	for _, v := range r.Results {
		text = fmt.Appendf(text, "%s\t%s\t%d\t%d\t", v.Operation, v.Shape, v.Log.Syncs, v.Possible)
		for _, c := range []judge.Count{
			v.States, v.QEMU.Clean, v.QEMU.Leaks, v.QEMU.Corrupt, v.QEMU.Unusable, v.WrongData, v.WrongLater,
		} {
			if c.States == 0 {
				text = append(text, "0\t"...)
			} else {
				text = fmt.Appendf(text, "%d (%d)\t", c.States, c.Distinct)
			}
		}
		text = append(text, '\n')
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	if _, err := table.Write(text); err != nil {
		return err
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, v := range r.Results {
		if v.Disagree.States > 0 {
			_, err := fmt.Fprintf(w, "%s, %s: the two checkers disagree in %d states\n", v.Operation, v.Shape, v.Disagree.States)
			if err != nil {
				return err
			}
		}
	}
	return nil
}
