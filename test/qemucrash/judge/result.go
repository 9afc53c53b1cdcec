package judge

// Result is what became of a trial. Wherever it counts, distinct means states with different contents.
type Result struct {
	Operation string `json:"operation"`
	Shape     string `json:"shape"`
	Log       Log    `json:"log"`
	Possible  int    `json:"possible"` // states enumerated, of which those judged were drawn
	States    Count  `json:"states"`   // judged

	QEMU     Verdicts         `json:"qemu_img_check"`
	Own      Verdicts         `json:"qcow_check"`
	Disagree Count            `json:"disagree"` // only one of the two finds corruption
	Findings map[string]Count `json:"findings"` // states with a finding of the kind, by package check

	// Dirty has the states in which an image says that its refcounts are not to be relied on. It is opened for writing, which
	// makes QEMU repair it, and judged as it is then.
	Dirty Count `json:"dirty"`
	// WrongData has the states in which the disk or a snapshot is not what it may be, or can't be read.
	WrongData Count `json:"wrong_data"`
	// WrongLater has those whose content is right, until writes to the disk change something else or fail.
	WrongLater Count `json:"wrong_later"`

	Examples []Example `json:"examples,omitempty"` // the first state of each kind that must not be
}

// Count counts states.
type Count struct {
	States   int `json:"states"`
	Distinct int `json:"distinct"`
}

func (c *Count) add(states int) {
	if states > 0 {
		c.States += states
		c.Distinct++
	}
}

// Verdicts counts what a checker says. Each state is in one of them.
type Verdicts struct {
	Clean    Count `json:"clean"`
	Leaks    Count `json:"leaks"`
	Corrupt  Count `json:"corrupt"`
	Unusable Count `json:"unusable"` // cannot be checked
}

// verdict is what a checker says, from good to bad.
type verdict uint8

const (
	clean verdict = iota
	leaks
	corrupt
	unusable
)

func (v *Verdicts) add(what verdict, states int) {
	[]*Count{clean: &v.Clean, leaks: &v.Leaks, corrupt: &v.Corrupt, unusable: &v.Unusable}[what].add(states)
}

// Log counts what the operation did to the files.
type Log struct {
	Writes    int `json:"writes"`
	Punches   int `json:"punches"`
	Truncates int `json:"truncates"` // and allocations
	Syncs     int `json:"syncs"`
}

// Example is a state.
type Example struct {
	Kind  string `json:"kind"`
	State string `json:"state"` // how it came about
	What  string `json:"what"`  // is wrong
}
