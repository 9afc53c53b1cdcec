package main

import (
	"os"
	"runtime"
)

// moreThreads lets more goroutines run at a time than there are processors, unless the environment says how many. Those that serve NBD wait
// for their clients, and for the disk, in system calls; coming back from one they need a turn, which they would otherwise get from each
// other when the runtime gets round to it. The kernel shares the processors out sooner, and more evenly.
func moreThreads() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(8, 4*processors))
	}
}

// processors is how many this process may use, with the limits of its container in mind.
var processors = runtime.GOMAXPROCS(0)
