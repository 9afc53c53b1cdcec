// Package nbdtest is for tests of NBD servers and of what they serve: [Client] is a client that shares no code with
// the server and can send it anything, in every [Style]; its [Ledger] holds replies to the specification; [Authority]
// makes certificates; [Memory] is a backend whose every operation can be watched, delayed and failed, and
// [TestBackend] the suite that a backend has to pass.
package nbdtest
