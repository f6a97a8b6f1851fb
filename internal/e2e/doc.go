// Package e2e holds tests of the built daemon between real targets and clients.
package e2e
