package main

import (
	"bytes"
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/qcow-csi/qcow-csi/qcow/storage"
	"github.com/qcow-csi/qcow-csi/test/qemucrash/judge"
	"github.com/qcow-csi/qcow-csi/test/qemucrash/recording"
	"github.com/qcow-csi/qcow-csi/test/require"
)

const seed = 1

func build(t *testing.T) *recording.Shim {
	require.Tool(t, "qemu-img", "qemu-io", "gcc")
	shim, err := recording.Build(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return shim
}

// recorded has what was recorded already: several tests look at it.
var recorded = map[string]*judge.Trial{}

func record(t *testing.T, shim *recording.Shim, o *operation, s *shape) *judge.Trial {
	t.Helper()
	name := o.name + "/" + s.name
	if recorded[name] == nil {
		trial, err := o.record(t.Context(), &stage{dir: t.TempDir(), shape: s, shim: shim, seed: seed})
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		recorded[name] = trial
	}
	return recorded[name]
}

// TestRecordingIsComplete: what was recorded makes the images as they were before into what QEMU left; and every flush
// that a guest had to wait for shows as a sync.
func TestRecordingIsComplete(t *testing.T) {
	shim := build(t)
	for _, o := range operations {
		for _, s := range shapes {
			t.Run(o.name+"/"+s.name, func(t *testing.T) {
				trial := record(t, shim, o, s)
				var initial [][]byte
				for _, image := range trial.Images {
					initial = append(initial, image.Initial)
				}
				final, err := recording.Replay(initial, trial.Ops)
				if err != nil {
					t.Fatal(err)
				}
				syncs := 0
				for _, op := range trial.Ops {
					if op.Kind == storage.OpSync {
						syncs++
					}
				}
				if syncs == 0 {
					t.Error("no sync was recorded")
				}
				for i, image := range trial.Images {
					if !bytes.Equal(final[i], image.Final) {
						t.Errorf("%s: the recording gives another file", image.Name)
					}
				}
				checkRequests(t, trial)
			})
		}
	}
}

func checkRequests(t *testing.T, trial *judge.Trial) {
	written := false // since the last flush
	for i, r := range trial.Requests {
		if r.Start > r.End || r.End > len(trial.Ops) || i > 0 && r.Start != trial.Requests[i-1].End {
			t.Fatalf("request %d: %+v", i, r)
		}
		synced := false
		for _, op := range trial.Ops[r.Start:r.End] {
			synced = synced || op.Kind == storage.OpSync
		}
		if r.Kind == judge.Flush && written && !synced {
			t.Errorf("request %d: no sync while the guest waited for its flush", i)
		}
		written = r.Kind != judge.Flush && (written || r.End > r.Start)
	}
}

// TestNothingAndEverything: an image to which nothing happened is in order, and so is one to which everything happened.
func TestNothingAndEverything(t *testing.T) {
	shim := build(t)
	s := shapes[0]
	known := map[string]bool{} // content: many begin with the same image
	for _, o := range operations {
		t.Run(o.name, func(t *testing.T) {
			whole := record(t, shim, o, s)
			for name, content := range map[string]func(judge.Image) []byte{
				"nothing":    func(i judge.Image) []byte { return i.Initial },
				"everything": func(i judge.Image) []byte { return i.Final },
			} {
				trial := &judge.Trial{Operation: o.name, Shape: s.name, Beside: whole.Beside}
				trial.Ops = []storage.Op{{Kind: storage.OpMark}}
				all := ""
				for _, image := range whole.Images {
					b := content(image)
					all += string(b)
					trial.Images = append(trial.Images, judge.Image{Name: image.Name, Initial: b, Final: b})
				}
				if known[all] {
					continue
				}
				known[all] = true
				r, err := judge.Judge(t.Context(), trial, judge.Options{States: 10, Dir: t.TempDir()})
				if err != nil {
					t.Fatal(err)
				}
				if r.States != (judge.Count{States: 1, Distinct: 1}) || r.QEMU.Clean != r.States || r.Own.Clean != r.States ||
					r.WrongData.States+r.WrongLater.States > 0 {
					t.Errorf("%s: %+v", name, r)
				}
			}
		})
	}
}

// TestShrinkOfQEMU holds a small run to what is true of any: each state is in one class, and a seed gives one result.
func TestShrinkOfQEMU(t *testing.T) {
	shim := build(t)
	for _, o := range operations {
		if o.name != "shrink" {
			continue
		}
		trial := record(t, shim, o, shapes[0])
		var results []*judge.Result
		for range 2 {
			r, err := judge.Judge(t.Context(), trial, judge.Options{States: 24, Seed: seed, Dir: t.TempDir()})
			if err != nil {
				t.Fatal(err)
			}
			results = append(results, r)
		}
		r := results[0]
		t.Logf("%+v", r)
		if r.States.States != min(24, r.Possible) || r.States.Distinct > r.States.States {
			t.Errorf("%d possible states, judged %v", r.Possible, r.States)
		}
		for _, v := range []judge.Verdicts{r.QEMU, r.Own} {
			if v.Clean.States+v.Leaks.States+v.Corrupt.States+v.Unusable.States != r.States.States ||
				v.Clean.Distinct+v.Leaks.Distinct+v.Corrupt.Distinct+v.Unusable.Distinct != r.States.Distinct {
				t.Errorf("%+v of %v", v, r.States)
			}
		}
		for i := range results {
			for k := range results[i].Examples {
				results[i].Examples[k].What = "" // has names of temporary files
			}
		}
		if !reflect.DeepEqual(results[0], results[1]) {
			t.Errorf("%+v\n%+v", results[0], results[1])
		}
		return
	}
	t.Error("there is no such operation")
}

func TestReport(t *testing.T) {
	r := report{QEMU: "qemu-img version 1", Seed: 3, States: 200, Results: []*judge.Result{{
		Operation: "snapshot-create", Shape: "default", Log: judge.Log{Syncs: 8}, Possible: 1234,
		States:     judge.Count{States: 200, Distinct: 50},
		QEMU:       judge.Verdicts{Clean: judge.Count{States: 170, Distinct: 40}, Corrupt: judge.Count{States: 30, Distinct: 10}},
		WrongLater: judge.Count{States: 7, Distinct: 2},
		Disagree:   judge.Count{States: 1, Distinct: 1},
	}}}
	var table, asJSON strings.Builder
	if err := r.writeTable(&table); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"qemu-img version 1; seed 3, at most 200 states of each\n",
		"snapshot-create  default      8      1234  200 (50)  170 (40)      0  30 (10)         0      0  7 (2)\n",
		"snapshot-create, default: the two checkers disagree in 1 states\n",
	} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("no %q in:\n%s", want, table.String())
		}
	}
	if err := r.writeJSON(&asJSON); err != nil {
		t.Fatal(err)
	}
	var got report
	if err := json.Unmarshal([]byte(asJSON.String()), &got); err != nil || !reflect.DeepEqual(got, r) {
		t.Errorf("%v: %+v", err, got)
	}
}
