package main

import (
	"encoding/json"
	"strings"
	"testing"
)

func testReport() report {
	samples := func(values ...float64) (ss []sample) {
		for _, v := range values {
			ss = append(ss, sample{Value: v, CPU: v / 10})
		}
		return ss
	}
	return report{
		Machine: machine{Processor: "a processor", CPUs: 2},
		Rounds:  3,
		Runtime: 2,
		Servers: []server{{"qcow-csi", []string{"ours"}}, {"qemu-nbd", []string{"theirs"}}},
		Notes:   []string{"something to know"},
		Rows: []row{
			{Workload: workloads[0], Command: []string{"fio"}, Samples: [][]sample{samples(90, 300, 100), samples(40, 50, 1)}},
			{Workload: workloads[1], Samples: [][]sample{samples(10, 30), samples(40, 40)}},
		},
	}
}

func TestTable(t *testing.T) {
	r := testReport()
	var b strings.Builder
	if err := r.writeTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"a processor, 2 CPUs", "qcow-csi: ours IMAGE\n", "qemu-nbd: theirs IMAGE\n", "note: something to know\n", "medians of 3 rounds of 2 s",
		"random read 4k      1       100  (10.0)        40  (4.0)  IOPS   2.50\n",
		"random read 4k     16        20   (2.0)        40  (4.0)  IOPS   0.50\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in:\n%s", want, b.String())
		}
	}
}

func TestJSON(t *testing.T) {
	r := testReport()
	var b strings.Builder
	if err := r.writeJSON(&b); err != nil {
		t.Fatal(err)
	}
	var got report
	if err := json.Unmarshal([]byte(b.String()), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Rows) != 2 || got.Rows[0].Ratio != 2.5 || got.Rows[0].Medians[1].CPU != 4 || got.Rows[0].Workload.Depth != 1 {
		t.Errorf("rows %+v", got.Rows)
	}
}

func TestParseFio(t *testing.T) {
	const good = "fio: connected to NBD server\n" + `{"fio version": "fio-3.33", "jobs": [{"error": 0,
		"read": {"total_ios": 10, "iops": 5.5, "bw_bytes": 100}, "write": {"total_ios": 0, "iops": 0, "bw_bytes": 0}}]}`
	if f, err := parseFio([]byte(good)); err != nil || f != (figures{10, 5.5, 100}) {
		t.Errorf("%+v, %v", f, err)
	}
	for name, out := range map[string]string{
		"nothing":      "",
		"no JSON":      "fio: connected to NBD server\n",
		"half a JSON":  good[:80],
		"no jobs":      `{"jobs": []}`,
		"an error":     strings.Replace(good, `"error": 0`, `"error": 5`, 1),
		"nothing done": strings.Replace(good, `"total_ios": 10`, `"total_ios": 0`, 1),
	} {
		if f, err := parseFio([]byte(out)); err == nil {
			t.Errorf("%s: %+v", name, f)
		}
	}
}
