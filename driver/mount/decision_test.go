package mount

import (
	"errors"
	"fmt"
	"strings"
	"testing"
)

// The whole format guard: a row for each record, a column for each content, for a volume of which an ext4 is wanted.
// "record" cells say what happens; an error class stands for refuse.
const decisionTable = `
record                       | blank        | ext4         | xfs             | partitions      | unknown
never-formatted              | makeNew      | inconsistent | inconsistent    | inconsistent    | inconsistent
never-formatted, allocated   | not blank    | adopt        | wrong           | wrong           | not blank
formatting ext4              | remake       | remake       | inconsistent    | inconsistent    | remake
formatting ext4, allocated   | remake       | remake       | inconsistent    | inconsistent    | remake
formatting xfs               | wrong        | wrong        | wrong           | wrong           | wrong
formatting xfs, allocated    | wrong        | wrong        | wrong           | wrong           | wrong
formatted ext4               | inconsistent | use          | wrong           | wrong           | inconsistent
formatted ext4, allocated    | inconsistent | use          | wrong           | wrong           | inconsistent
formatted xfs                | wrong        | wrong        | wrong           | wrong           | wrong
formatted xfs, allocated     | wrong        | wrong        | wrong           | wrong           | wrong
raw-block                    | not blank    | use          | wrong           | wrong           | not blank
raw-block, allocated         | not blank    | use          | wrong           | wrong           | not blank
                             | not blank    | adopt        | wrong           | wrong           | not blank
, allocated                  | not blank    | adopt        | wrong           | wrong           | not blank
garbage                      | not blank    | adopt        | wrong           | wrong           | not blank
garbage, allocated           | not blank    | adopt        | wrong           | wrong           | not blank
`

var (
	contents = map[string]Content{
		"blank":      {Blank: true},
		"ext4":       {Type: "ext4"},
		"xfs":        {Type: "xfs"},
		"partitions": {Type: "partition-table:gpt"},
		"unknown":    {},
	}
	choices = map[string]decision{"use": use, "adopt": adopt, "makeNew": makeNew, "remake": remake}
	classes = map[string]error{"not blank": ErrNotBlank, "wrong": ErrWrongFilesystem, "inconsistent": ErrInconsistent}
)

func TestDecisions(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(decisionTable), "\n")
	columns := cells(lines[0])[1:]
	if len(columns) != len(contents) {
		t.Fatalf("columns %q, contents %v", columns, contents)
	}
	formats := 0
	for _, line := range lines[1:] {
		row := cells(line)
		state, more, _ := strings.Cut(row[0], ",")
		phase, fsType, _ := strings.Cut(state, " ")
		record := FormatState{Phase: Phase(phase), Type: fsType}
		allocated := more == " allocated"
		for i, column := range columns {
			for _, readOnly := range []bool{false, true} {
				name := fmt.Sprintf("%s/%s/ro=%t", row[0], column, readOnly)
				filesystem := Filesystem{Type: "ext4"}
				if readOnly {
					filesystem.Options = []string{"ro"}
				}
				got, err := decide(record, allocated, contents[column], filesystem)

				want, wantErr := choices[row[i+1]], classes[row[i+1]]
				if want == refuse && wantErr == nil {
					t.Fatalf("%s: %q is neither a decision nor a class", name, row[i+1])
				}
				if (want == makeNew || want == remake) && readOnly {
					want, wantErr = refuse, ErrReadOnly
				}
				if got != want || !errors.Is(err, wantErr) || (err == nil) != (wantErr == nil) {
					t.Errorf("%s: %d, %v; want %s", name, got, err, row[i+1])
				}

				// Said once more, without the table: what permits mkfs.
				if got == makeNew || got == remake {
					formats++
					blank := record.Phase == NeverFormatted && !allocated && contents[column].Blank
					ours := record.Phase == Formatting && record.Type == "ext4"
					if !blank && !ours || readOnly {
						t.Errorf("%s: mkfs", name)
					}
				}
			}
		}
	}
	if formats != 1+6 {
		t.Errorf("mkfs in %d cases", formats)
	}
}

func cells(line string) []string {
	row := strings.Split(line, "|")
	for i := range row {
		row[i] = strings.TrimSpace(row[i])
	}
	return row
}
